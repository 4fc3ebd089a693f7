"""What fine-tuning says of an adapter, for tests of adapters that were never trained."""

TRAINED = {
    "name": "ctrl",
    "gamma": 1.0,
    "effective_gamma": 1.0,
    "train_seconds": 2.0,
    "device": "cpu",
    "last": {"log_prob": -0.1, "kl_nats": 1.5, "oracle_accuracy": 0.9},
    "finetune": {"trainer": "backprop", "num_updates": 3, "batch_size": 2, "probe": {"num_images": 8}},
}
