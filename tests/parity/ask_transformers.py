"""Asks an exported model with transformers alone: `python ask_transformers.py FOLDER QUESTIONS ROWS [ADAPTER]`.

Prints token ids of answers as JSON, and saves the logits of their first tokens as QUESTIONS.npy. QUESTIONS is a JSON
file: [{"image": path, "question": text}, ...]. ROWS questions are answered at once. peft puts ADAPTER on the model.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image


def main(folder: str, questions: str, rows: int, adapter: str | None = None) -> None:
    asked = json.loads(Path(questions).read_text(encoding="utf-8"))
    processor = transformers.AutoProcessor.from_pretrained(folder, backend="pil")
    model, loading = transformers.AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    if any(loading.values()):
        raise SystemExit(f"missing or unexpected: {loading}")
    ends = torch.tensor(model.generation_config.eos_token_id).reshape(-1).tolist()
    if adapter:
        import peft

        model = peft.PeftModel.from_pretrained(model, adapter)
    answers, logits = [], []
    for first in range(0, len(asked), rows):
        some = asked[first : first + rows]
        chats = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": each["question"]}]}]
            for each in some
        ]
        texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
        images = [Image.open(each["image"]).convert("RGB") for each in some]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        made = model.generate(
            **inputs, do_sample=False, max_new_tokens=12, output_logits=True, return_dict_in_generate=True
        )
        ids = made.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        logits.append(made.logits[0].numpy())
        answers += [row[: next((i + 1 for i, each in enumerate(row) if each in ends), len(row))] for row in ids]
    if "ross_jax" in sys.modules:
        raise SystemExit("ross_jax was imported")
    np.save(questions + ".npy", np.concatenate(logits))
    print(json.dumps(answers))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
