"""Greedy answers of a model folder, by vLLM or by plain transformers; runs in vLLM's environment without this project.

    python answers.py vllm|transformers FOLDER QUESTIONS.json ANSWERS.json

A question is {"prompt": text with a placeholder for each picture, "images": [paths]}; an answer is {"ids": its tokens, "text": with
control tokens kept, "gaps": the difference of log-probabilities between the best and the second best token, for each token}.
"""

import json
import os
import sys

os.environ.update(
    HF_HUB_OFFLINE="1",
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

from PIL import Image

MAX_TOKENS = 40


def load_images(question: dict) -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in question["images"]]


def answer_with_vllm(folder: str, questions: list[dict]) -> list[dict]:
    from vllm import LLM, SamplingParams

    model = LLM(
        folder,
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=8,
        limit_mm_per_prompt={"image": 2, "video": 0},
    )
    greedy = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, skip_special_tokens=False, logprobs=2)
    prompts = []
    for question in questions:
        prompt = {"prompt": question["prompt"]}
        if question["images"]:
            prompt["multi_modal_data"] = {"image": load_images(question)}
        prompts.append(prompt)
    answers = []
    for result in model.generate(prompts, greedy, use_tqdm=False):
        (output,) = result.outputs
        best = [sorted((entry.logprob for entry in step.values()), reverse=True)[:2] for step in output.logprobs]
        gaps = [first - second for first, second in best]
        answers.append({"ids": list(output.token_ids), "text": output.text, "gaps": gaps})
    return answers


def answer_with_transformers(folder: str, questions: list[dict]) -> list[dict]:
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(folder)
    answers = []
    for question in questions:
        inputs = processor(text=question["prompt"], images=load_images(question) or None, return_tensors="pt")
        output = model.generate(
            **inputs, max_new_tokens=MAX_TOKENS, do_sample=False, output_scores=True, return_dict_in_generate=True
        )
        ids = output.sequences[0, inputs["input_ids"].shape[1] :]
        best = [step[0].topk(2).values for step in output.scores]
        gaps = [float(first - second) for first, second in best]
        answers.append({"ids": ids.tolist(), "text": processor.decode(ids), "gaps": gaps})
    return answers


if __name__ == "__main__":
    backend, folder, questions, out = sys.argv[1:]
    with open(questions, encoding="utf-8") as file:
        loaded_questions = json.load(file)
    answer = {"vllm": answer_with_vllm, "transformers": answer_with_transformers}[backend]
    with open(out, "w", encoding="utf-8") as file:
        json.dump(answer(folder, loaded_questions), file, ensure_ascii=False)
