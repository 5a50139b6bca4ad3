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
    install_requires=[
        "torch>=2.13",
        "diffusers>=0.42",  # pipeline, schedulers, LoRA files
        "transformers>=5.23",  # text encoders, CLIP rewards
        "accelerate>=1.15",  # devices, processes, mixed precision, trackers
        "peft>=0.21",  # LoRA layers
        "datasets>=5.2",  # prompts from the hub or from files
        "tensorboard>=2.20",  # the default of --report_to
    ],
    extras_require={
        # 8-bit Adam and memory-efficient attention
        "gpu": ["bitsandbytes>=0.50", "xformers"],
        # clip and pickscore need nothing beyond the base; scorers that do will be listed here
        "rewards": [],
        # bitsandbytes runs on CPU too, and the tests train with it
        "test": ["pytest>=9", "ruff>=0.15", "bitsandbytes>=0.50"],
        # draws the artwork for demo/recipe; running the demo needs no extra
        "demo": ["resvg_py>=0.5"],
    },
)
