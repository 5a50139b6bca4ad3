from pathlib import Path

from setuptools import find_packages, setup


setup(
    name="pso-utils",
    version="0.1.0",
    description="Pairwise Sample Optimization of few-step text-to-image models, as diffusers training examples",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pso_utils", "pso_utils.*"]),
    package_data={"pso_utils.evaluate": ["report.html"]},
    install_requires=[
        "torch>=2.6.0",
        "diffusers>=0.40.0",  # pipelines, schedulers, LoRA files; 0.39 has no `dtype`
        "transformers>=5.18.0",  # text encoders, CLIP rewards; AutoImageProcessor without torchvision
        "accelerate>=1.12.0",  # devices, processes, mixed precision, trackers
        "peft>=0.18.1",  # LoRA layers
        "datasets>=5.2.0",  # prompts and pairs; a stream by row groups needs 5
        "huggingface_hub>=1.31.0",  # single files of the hub, model cards, uploads
        "safetensors>=0.8.0",  # weights, cached latents
        "tensorboard>=2.20.0",  # the default of --report_to
        "numpy>=2.0.2",
        "pillow>=10.3.0",  # images; earlier ones open 16-bit grey as 32-bit
        "pyarrow>=24.0.0",  # the evaluation's scores.parquet
        "fsspec>=2026.6.0",  # URLs of streamed data sets; earlier ones run code in a reference file system
        "tqdm>=4.66.3",
    ],
    extras_require={
        # 8-bit Adam and memory-efficient attention
        "gpu": ["bitsandbytes>=0.50", "xformers"],
        # bitsandbytes runs on CPU too, and the tests train with it; scipy is what statistics are held against; xdist
        # runs the tests on all cores
        "test": ["pytest>=9", "pytest-xdist>=3.8", "ruff>=0.15", "bitsandbytes>=0.50", "scipy>=1.15"],
        # draws the artwork for demo/recipe; running the demo needs no extra
        "demo": ["resvg_py>=0.5"],
    },
)
