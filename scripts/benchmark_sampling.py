"""What sampling with an adapter costs over the pretrained model: prints ratios of seconds and of UNet passes, batches taken in turn."""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from ctrl import control as controls
from ctrl import errors
from ctrl.sampling import noise_of, sample
from scripts.common import add_config_argument, load_config
from scripts.loading import adapter_denoiser, load_base, pretrained_denoiser


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_argument(parser)
    parser.add_argument("--adapter", type=Path, required=True, help="folder of the trained adapter")
    parser.add_argument("--num-batches", type=int, default=12, help="timed batches of each kind, after one untimed (default: %(default)s)")
    parser.add_argument("--num-threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    args = parser.parse_args()
    config = load_config(args)
    size = config["sampler"]["batch_size"]
    pairs = [load_base(config, args.num_threads) for _ in range(3)]  # each its own: an adapter stays in its network
    models = {
        "pretrained": pretrained_denoiser(*pairs[0], config),
        "adapter": adapter_denoiser(controls.load(pairs[1][0], args.adapter).merge(), pairs[1][1], config, 1.0),
        "adapter, not merged": adapter_denoiser(controls.load(pairs[2][0], args.adapter), pairs[2][1], config, 1.0),
    }
    prompts = [config["prompts"]["templates"]["test"][0].format(config["prompts"]["subjects"][0])] * size
    labels, seconds = torch.zeros(size, dtype=torch.long), {name: [] for name in models}
    for number in range(args.num_batches + 1):
        for (name, make_denoiser), (base, process) in zip(models.items(), pairs, strict=True):
            noise = noise_of(range(number * size, (number + 1) * size), base.latent_shape, process.num_steps, base.device)
            started = time.perf_counter()
            x_0 = sample(process, make_denoiser(prompts, labels), noise)
            with torch.no_grad():
                base.decode(x_0).cpu()
            if number:
                seconds[name].append((time.perf_counter() - started) / size)
    passes = [base.passes.forward for base, _ in pairs]
    median = {name: statistics.median(values) for name, values in seconds.items()}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    result = {"device": device, "num_images": args.num_batches * size, "seconds_per_image": {k: round(v, 5) for k, v in median.items()}}
    for k, name in list(enumerate(models))[1:]:
        result[f"seconds, {name} / pretrained"] = round(median[name] / median["pretrained"], 3)
        result[f"passes, {name} / pretrained"] = passes[k] / passes[0]
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    errors.main(main)
