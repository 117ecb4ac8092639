"""What is asked of engines in their tests."""

from __future__ import annotations

from montessori.loop.engines import EngineSettings, Request, derive_seed, open_engine

PROMPTS = ["name a colour", "say", "what is the capital of france", "add two and three"]


def opened(teacher, **settings):
    engine = open_engine(EngineSettings(**settings))
    engine.load(teacher)
    return engine


def requests(prompts, siblings=1, seed=0):
    return [
        Request(f"{row}-{sibling}", prompt, derive_seed(seed, row, sibling))
        for row, prompt in enumerate(prompts)
        for sibling in range(siblings)
    ]


def write_all(engine, asked, sampling, stop=()):
    texts = {request.id: sample for part in engine.write(asked, sampling, stop) for request, sample in part}
    return [texts[request.id] for request in asked]
