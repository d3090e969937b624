"""Packaging of jentropy: all metadata stands here."""

from pathlib import Path

from setuptools import find_packages, setup

CORE = [
    "jax>=0.10.2",
    "flax>=0.12.8",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "chex>=0.1.92",
    "numpy>=2.0",
    "tensorflow-datasets>=4.9.10",
    "array_record>=0.8.6",
    "grain>=0.2.18",
    "fiddle>=0.3.1",
    "matplotlib>=3.10",
    "tqdm>=4.67",
    "tensorboardX>=2.6.5",
    "safetensors>=0.8.0",
]

RUN_NOTEBOOKS = ["nbclient>=0.10", "ipykernel>=6.29"]
TEST = ["pytest>=9.0", "pytest-xdist>=3.8", "hypothesis>=6.170", "ruff==0.17.*", *RUN_NOTEBOOKS]

setup(
    name="jentropy",
    version="0.1.0",
    description="Policy entropy in reinforcement learning with verifiable rewards, in pure JAX",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The jentropy Authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["jentropy", "jentropy.*"]),
    package_data={"jentropy": ["py.typed"]},
    install_requires=CORE,
    extras_require={
        "test": TEST,
        "dev": [*TEST, "pre-commit>=4.0", "pyright[nodejs]>=1.1.414", "nbstripout>=0.9"],
        "hf": ["tokenizers>=0.22"],
        "notebooks": ["jupyterlab>=4.4", *RUN_NOTEBOOKS],
        "cuda13": ["jax[cuda13]>=0.10.2"],
        "tpu": ["jax[tpu]>=0.10.2"],
    },
    entry_points={"console_scripts": ["jentropy = jentropy.cli:main"]},
    classifiers=[
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
