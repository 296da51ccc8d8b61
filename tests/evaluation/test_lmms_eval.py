"""Stock lmms-eval scores a checkpoint through the adapter, as launch/evaluate.py does."""

import json
import os
import subprocess

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from launcher import REPOSITORY, load_script
from tiny_model import write_model

PYTHON = REPOSITORY / ".venv-lmms" / "bin" / "python"
TASK = """
include: {include}
task: pope_file
dataset_path: parquet
dataset_kwargs: {{data_files: {{test: {data}}}}}
lmms_eval_specific_kwargs: {{default: {{pre_prompt: "", post_prompt: ""}}}}
"""


@pytest.mark.slow
@pytest.mark.skipif(not PYTHON.is_file(), reason="needs lmms-eval: bash launch/setup.sh --env lmms")
def test_pope_of_stock_lmms_eval(tmp_path):
    rng = np.random.default_rng(0)
    images = []
    for i in range(5):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"{i}.png")
        images.append({"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": f"{i}.png"})
    columns = {
        "question_id": [str(i) for i in range(5)],
        "question": [f"Is it {'very ' * i}big?" for i in range(5)],
        "answer": ["yes", "no", "yes", "no", "no"],
        "image": images,
    }
    features = {name: {"dtype": "string", "_type": "Value"} for name in columns} | {"image": {"_type": "Image"}}
    table = pyarrow.table(columns).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    parquet.write_table(table, tmp_path / "pope.parquet")
    model, output = write_model(tmp_path / "model"), tmp_path / "scores"
    args = [
        "--checkpoint",
        model,
        "--benchmark",
        "pope",
        "--data",
        tmp_path,
        "--output",
        output,
        "--max-new-tokens",
        24,
    ]
    assert load_script("evaluate").main([str(arg) for arg in args]) == 0
    ours = json.loads((output / "results.json").read_text())["pope"]["scores"]

    stock = next((PYTHON.parents[1] / "lib").glob("python*/site-packages/lmms_eval/tasks/pope/pope.yaml"))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "pope_file.yaml").write_text(TASK.format(include=stock, data=tmp_path / "pope.parquet"))
    command = [str(PYTHON), "-m", "lmms_eval", "--model", "ross_jax", "--tasks", "pope_file", "--batch_size", "2"]
    command += ["--model_args", f"pretrained={model},max_new_tokens=24", "--include_path", str(tmp_path / "tasks")]
    command += ["--output_path", str(tmp_path / "lmms"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    environ = os.environ | offline | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environ, cwd=tmp_path, check=False)
    results = list((tmp_path / "lmms").rglob("*_results.json"))
    assert results, done.stdout + done.stderr
    theirs = json.loads(results[0].read_text())["results"]["pope_file"]
    for name, metric in (("accuracy", "accuracy"), ("f1", "f1_score"), ("yes_ratio", "yes_ratio")):
        assert 100 * theirs[f"pope_{metric},none"] == pytest.approx(ours[f"{name}_lmms"]), name
    samples = next((tmp_path / "lmms").rglob("*samples*.jsonl")).read_text().splitlines()
    answers = {row["doc_id"]: row["filtered_resps"] for row in map(json.loads, samples)}
    lines = [json.loads(line) for line in (output / "pope.jsonl").read_text().splitlines()[1:]]
    predictions = [line["prediction"] for line in lines]
    assert [answers[i] for i in range(5)] == predictions and len(set(predictions)) > 2
