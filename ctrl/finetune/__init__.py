"""Fine-tuning as entropy-regularised reinforcement learning: the trainers, and a loop that knows none of them."""
