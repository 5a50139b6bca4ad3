from pathlib import Path

from setuptools import find_packages, setup


setup(
    name="pso-utils",
    version="0.1.0",
    description="Pairwise Sample Optimization of timestep-distilled SDXL models, as diffusers training examples",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["pso_utils", "pso_utils.*"]),
    # With the lower bounds together, no test failed. Run: the modules' tests, and those of both scripts and of the demo
    # that are not marked slow.
    install_requires=[
        "torch>=2.13.0",
        "diffusers>=0.40.0",  # pipeline, schedulers, LoRA files; 0.39 has no `dtype`
        "transformers>=5.5.4",  # text encoders, CLIP rewards
        "accelerate>=1.12.0",  # devices, processes, mixed precision, trackers
        "peft>=0.18.1",  # LoRA layers
        "datasets>=5.2.0",  # prompts and pairs; a stream by row groups needs 5
        "tensorboard>=2.20.0",  # the default of --report_to
    ],
    extras_require={
        # 8-bit Adam and memory-efficient attention
        "gpu": ["bitsandbytes>=0.50", "xformers"],
        # imscore:NAME; clip, pickscore and aesthetic need nothing beyond the base
        "rewards": ["imscore>=0.0.11", "torchvision"],
        # bitsandbytes runs on CPU too, and the tests train with it; scipy is what statistics are held against
        "test": ["pytest>=9", "ruff>=0.15", "bitsandbytes>=0.50", "scipy>=1.15"],
        # draws the artwork for demo/recipe; running the demo needs no extra
        "demo": ["resvg_py>=0.5"],
    },
)
