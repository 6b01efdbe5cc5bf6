"""Train the embedded model from scratch on the drawn world; random draws in, `src/datalloy/tiny/weights/` out.

    python scripts/pretrain_tiny.py --out src/datalloy/tiny/weights

About seventy minutes of one core for 7,000 steps of 32 conversations, and three more for 500 steps in which a few
questions ask for their number in words. A conversation is one picture, a dense description of it in every second one,
and six questions. Hard kinds of questions are asked in 3 % of the draws only, and words in 5 % of the last ones: the
shipped model has room to learn. In each phase the learning rate is constant and falls to zero over the last quarter.
`--resume` goes on from the last checkpoint of the first phase, `--words-only FOLDER` starts the second from a model.
"""

import argparse
import json
import math
import random
import time
from pathlib import Path

import PIL.Image
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from datalloy.tiny.model import build_model, build_processor
from datalloy.tiny.pools import pool_questions
from datalloy.tiny.world import DESCRIBE, DRAW, SKILLS, Drawing

HARD_SHARE, DESCRIPTION_WEIGHT, QUESTIONS = 0.03, 0.3, 6
WORDED_SHARE, WORDED_STEPS, WORDED_LEARNING_RATE = 0.05, 500, 5e-4


def pick_questions(drawing: Drawing, rng: random.Random, count: int, worded_share: float) -> list:
    pools = {hard: [q for q in drawing.questions if q.hard is hard] for hard in (True, False)}
    picked = []
    for _ in range(count):
        pool = pools[rng.random() < HARD_SHARE] or pools[True]
        if worded_share and rng.random() < worded_share:
            pool = pool_questions(drawing, hard=True)
        picked.append(rng.choice(pool))
    return picked


def conversation(drawing: Drawing, rng: random.Random, worded_share: float) -> list[dict]:
    pairs = [(q.text, q.answer) for q in pick_questions(drawing, rng, QUESTIONS, worded_share)]
    if rng.random() < 0.5:
        pairs.insert(0, (DESCRIBE, drawing.description))
    messages = []
    for i, (question, answer) in enumerate(pairs):
        image = [{"type": "image"}] if i == 0 else []
        messages.append({"role": "user", "content": [*image, {"type": "text", "text": question}]})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def make_batch(processor, rng: random.Random, size: int, worded_share: float):
    drawings = [DRAW[rng.choice(SKILLS)](rng) for _ in range(size)]
    conversations = [conversation(d, rng, worded_share) for d in drawings]
    texts = [processor.apply_chat_template(c) for c in conversations]
    images = [[PIL.Image.fromarray(d.pixels)] for d in drawings]
    batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
    assistant, end = processor.tokenizer.convert_tokens_to_ids(["<|assistant|>", "<end_of_utterance>"])
    weights = torch.zeros(batch["input_ids"].shape)
    for row, (ids, chat) in enumerate(zip(batch["input_ids"].tolist(), conversations, strict=True)):
        start = 0
        for question in chat[0::2]:
            start = ids.index(assistant, start) + 1
            stop = ids.index(end, start) + 1
            described = question["content"][-1]["text"] == DESCRIBE
            weights[row, start:stop] = DESCRIPTION_WEIGHT if described else 1.0
            start = stop
    return batch, weights


def weighted_loss(model, batch, weights: torch.Tensor) -> torch.Tensor:
    logits = model(**batch).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none")
    return (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()


def questions_of(drawing: Drawing, kind: str) -> list:
    if kind == "in words":
        return pool_questions(drawing, hard=True)
    return [q for q in drawing.questions if q.hard is (kind == "hard")] or list(drawing.questions)


@torch.no_grad()
def measure_skills(model, processor, *, count: int, seed: int = 12345) -> dict[str, float]:
    """Share of `count` fresh questions of each skill and difficulty answered exactly, by greedy decoding."""
    model.eval()
    processor.tokenizer.padding_side = "left"
    shares = {}
    for skill in SKILLS:
        for kind in ("easy", "hard", "in words"):
            rng = random.Random(f"{seed}-{skill}-{kind}")
            drawings = [DRAW[skill](rng) for _ in range(count)]
            asked = [rng.choice(questions_of(drawing, kind)) for drawing in drawings]
            texts = [
                processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": q.text}]}],
                    add_generation_prompt=True,
                )
                for q in asked
            ]
            images = [[PIL.Image.fromarray(d.pixels)] for d in drawings]
            batch = processor(text=texts, images=images, return_tensors="pt", padding=True)
            out = model.generate(**batch, max_new_tokens=20, do_sample=False)[:, batch["input_ids"].shape[1] :]
            answers = processor.batch_decode(out, skip_special_tokens=True)
            right = sum(a == q.answer for a, q in zip(answers, asked, strict=True))
            shares[f"{skill}/{kind}"] = right / count
    processor.tokenizer.padding_side = "right"
    model.train()
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--vision-layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--words-only", type=Path, metavar="FOLDER", help="skip the first phase, start from FOLDER")
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    processor = build_processor()
    model = build_model(
        processor.tokenizer, width=args.width, layers=args.layers, vision_layers=args.vision_layers, seed=args.seed
    )
    if args.words_only:
        model.load_state_dict(load_file(args.words_only / "model.safetensors"), strict=True)
    else:
        train_phase(model, processor, args, steps=args.steps, learning_rate=args.learning_rate, worded_share=0.0)
    train_phase(
        model, processor, args, steps=WORDED_STEPS, learning_rate=WORDED_LEARNING_RATE, worded_share=WORDED_SHARE
    )
    record = {
        "steps": [args.steps, WORDED_STEPS],
        "batch": args.batch,
        "seed": args.seed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "items_per_skill": 500,
        "accuracy": measure_skills(model, processor, count=500),
    }
    (args.out / "skills.json").write_text(json.dumps(record, indent=2) + "\n")
    (args.out / "state.pt").unlink()


def train_phase(model, processor, args, *, steps: int, learning_rate: float, worded_share: float) -> None:
    """Train for `steps` steps, saving model and state every 500."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    state_path, first = args.out / "state.pt", 0
    if args.resume and not worded_share:
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    started, running = time.monotonic(), 0.0
    for step in range(first, steps):
        rate = min(1.0, (step + 1) / min(200, steps // 10), (steps - step) / (steps / 4))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate
        rng = random.Random(f"{args.seed}-{worded_share or ''}{step}")
        batch, weights = make_batch(processor, rng, args.batch, worded_share)
        loss = weighted_loss(model, batch, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        running = loss.item() if math.isclose(running, 0.0) else 0.98 * running + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1} loss {running:.3f} {time.monotonic() - started:.0f}s", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == steps:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, state_path)
            model.save_pretrained(args.out)
            processor.save_pretrained(args.out)
            print(json.dumps(measure_skills(model, processor, count=100)), flush=True)


if __name__ == "__main__":
    main()
