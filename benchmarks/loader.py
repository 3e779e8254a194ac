"""Loader throughput on JPEGs (decode, 224 bicubic, crop, normalise), against grain and plain PIL.

    python -m benchmarks.loader [--images=DIR] [--batches=4] [--batch_size=64] [--workers=2] [--rounds=5]

Without --images the pictures are made up: blurred noise over gradients at 640x480, about as large as photos are.

`loader` is ours, reading a tar shard; `threads` a bare `ThreadPoolExecutor.map` over bytes in memory (the ceiling for
threads); `plain` one PIL loop; `grain` the same work through `grain.MapDataset` (left out where grain is not
installed). Contenders alternate; the last line is JSON with medians, ratios to `threads`, and images a second.
"""

import argparse
import collections
import concurrent.futures
import io
import itertools
import logging
import pathlib
import tarfile
import tempfile

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.measure import alternate, report
from vlm.data.batch import LoaderSettings
from vlm.data.image import ImageSettings, decode, process
from vlm.data.loader import Loader
from vlm.data.tar import TarSource

_SETTINGS = ImageSettings()


def transform(example, rng, train):
    """One example as the processors make it."""
    return {"image": process(decode(example["image"]), _SETTINGS)}


def made_up_pictures(count: int = 8, seed: int = 0) -> list[bytes]:
    """JPEGs of 640x480 with smooth areas, soft shapes and grain, as photos have."""
    rng = np.random.default_rng(seed)
    pictures = []
    for _ in range(count):
        ramp = np.linspace(0, 1, 640)[None, :, None] * rng.uniform(-80, 80, 3)
        ramp = ramp + np.linspace(0, 1, 480)[:, None, None] * rng.uniform(-80, 80, 3)
        pixels = 128 + ramp + rng.normal(0, 6, (480, 640, 3))
        for radius, strength in ((24, 60), (6, 30), (1.5, 25)):
            noise = Image.fromarray(rng.integers(0, 256, (480, 640, 3), np.uint8))
            blurred = np.asarray(noise.filter(ImageFilter.GaussianBlur(radius)), np.float32)
            pixels += (blurred - blurred.mean()) / blurred.std() * strength
        out = io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=85)
        pictures.append(out.getvalue())
    return pictures


def write_shard(path: str, pictures: list[bytes], count: int) -> None:
    """A webdataset shard of the pictures, repeated."""
    with tarfile.open(path, "w") as tar:
        for number, data in enumerate(itertools.islice(itertools.cycle(pictures), count)):
            info = tarfile.TarInfo(f"{number:06d}.jpg")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def ours(source: TarSource, batches: int, batch_size: int, workers: int):
    """One pass through our loader, start-up of the threads included (a pass ends: no work is made ahead unseen)."""
    loader = Loader([source], transform, LoaderSettings(batch_size, num_workers=workers), train=False)

    def run():
        with loader.iterate() as iterator:
            assert sum(1 for _ in iterator) == batches

    return run


def thread_pool(pictures: list[bytes], workers: int):
    """The same pictures through a bare thread pool."""

    def run():
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            collections.deque(pool.map(lambda data: transform({"image": data}, None, True), pictures), maxlen=1)

    return run


def grain_threads(source: TarSource, batches: int, batch_size: int, workers: int):
    """The same source through grain: shuffle and map lazily, read on threads, batch."""
    import grain

    logging.getLogger().setLevel(logging.ERROR)
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * batch_size)
    dataset = grain.MapDataset.source(source).shuffle(seed=0).map(lambda e: transform(e, None, True))

    def run():
        iterator = iter(dataset.to_iter_dataset(options).batch(batch_size))
        for _ in range(batches):
            next(iterator)

    return run


def main() -> None:
    """Runs the contenders and prints the JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=pathlib.Path, metavar="DIR", help="folder of JPEG files; default: made up")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    pictures = [p.read_bytes() for p in sorted(args.images.glob("*.jp*g"))] if args.images else made_up_pictures()
    if not pictures:
        parser.error(f"--images: no JPEG files in {args.images}")
    count = args.batches * args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        write_shard(f"{folder}/0.tar", pictures, count)
        source = TarSource(f"{folder}/0.tar", fields={"image": "jpg"})
        every = [source[i]["image"] for i in range(count)]
        contenders = {
            "loader": ours(source, args.batches, args.batch_size, args.workers),
            "threads": thread_pool(every, args.workers),
            "plain": lambda: [transform({"image": data}, None, True) for data in every],
        }
        try:
            contenders["grain"] = grain_threads(source, args.batches, args.batch_size, args.workers)
        except ImportError:
            print("grain is not installed: left out")
        times = alternate(contenders, rounds=args.rounds, warmup=1)
        seconds = {name: float(np.median([wall for wall, _ in runs])) for name, runs in times.items()}
        report(
            "loader",
            times,
            reference="threads",
            settings=vars(args) | {"images": str(args.images or "made up")},
            images_per_second={name: round(count / value, 1) for name, value in seconds.items()},
            mean_bytes=round(float(np.mean([len(p) for p in pictures]))),
        )


if __name__ == "__main__":
    main()
