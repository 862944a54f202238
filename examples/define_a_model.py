"""A model is written once, for one device, without quantization or parallelism: here a tiny one.

Calling it records a graph; the graph prints, is rewritten by passes, and says what a step costs.
"""

from pelton.graph import print_graph
from pelton.graph.cost import StepShape
from pelton.nn import Attention, CausalLM, Embedding, Linear, Node, RMSNorm, RopeSpec, Step, add, trace
from pelton.passes import run_passes


class OneLayer(CausalLM):
    def __init__(self, vocab: int, hidden: int, heads: int) -> None:
        head_dim = hidden // heads
        self.embed = Embedding(vocab, hidden)
        self.norm = RMSNorm(hidden, eps=1e-5)
        self.q_proj = Linear(hidden, hidden)
        self.k_proj = Linear(hidden, hidden)
        self.v_proj = Linear(hidden, hidden)
        self.attention = Attention(0, heads, heads, head_dim, rope=RopeSpec(head_dim, head_dim))
        self.o_proj = Linear(hidden, hidden)
        self.lm_head = self.embed.as_linear()

    def __call__(self, step: Step) -> Node:
        x = self.embed(step.token_ids)
        y = self.norm(x)
        x = add(x, self.o_proj(self.attention(self.q_proj(y), self.k_proj(y), self.v_proj(y), step)))
        return self.lm_head(x)


def main() -> None:
    graph = run_passes(trace(OneLayer(vocab=1000, hidden=64, heads=4), "one_layer"))
    print(print_graph(graph))
    prefill, decode = StepShape([512], [512], 1), StepShape([1], [513], 1)
    for name, shape in (("a prefill of 512 tokens", prefill), ("a decode step after it", decode)):
        print(f"{name}: {shape.evaluate(graph.flops) / 1e6:.2f} MFLOP")


if __name__ == "__main__":
    main()
