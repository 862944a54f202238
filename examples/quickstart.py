"""Complete a text, answer a question, stream an answer. MODEL as in `pelton run`; none: the demo model."""

import sys

from pelton import LLM, SamplingParams


def main(model: str = "") -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=24)
    with LLM(model, max_model_len=1024) as llm:
        for output in llm.generate(["The capital of France is", "Water boils at"], greedy):
            print(repr(output.prompt), "->", repr(output.outputs[0].text))

        question = [{"role": "user", "content": "Name three colours."}]
        answer = llm.chat(question, greedy)[0]
        print(answer.outputs[0].text, f"({answer.outputs[0].finish_reason})")

        for piece in llm.chat(question, SamplingParams(temperature=0.8, seed=1, max_tokens=24), stream=True):
            print(piece.outputs[0].text, end="", flush=True)
        print()


if __name__ == "__main__":
    main(*sys.argv[1:])
