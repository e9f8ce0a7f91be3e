"""Throw-away: do CUDA graph trees take an operator that writes into marked static tensors?"""

import statistics
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch
import triton
import triton.language as tl
from compiled import Block
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional


@triton.jit
def idle(control, x, n: tl.constexpr):
    if tl.load(control) == 0:
        return
    tl.atomic_add(x, 1.0)


class State:
    def __init__(self):
        self.acc = torch.zeros(2, 32, 120, 12, dtype=torch.float64, device="cuda")
        self.ext = torch.zeros(6, 12, dtype=torch.int32, device="cuda")
        for x in (self.acc, self.ext):
            torch._dynamo.mark_static_address(x, guard=False)


CONTROL = torch.zeros(1, dtype=torch.int64, device="cuda")
torch._dynamo.mark_static_address(CONTROL, guard=False)
LAUNCHES = 6
host = []


def run(acc, ext, control, q, k, v, out, is_causal):
    begin = time.perf_counter()
    capturing = torch.cuda.is_current_stream_capturing()
    temporary = torch.empty(4, *q.shape[:3], device=q.device)
    for _ in range(LAUNCHES):
        idle[(192, 1, 1)](control, acc, 1)
    del temporary
    if not capturing:
        host.append(time.perf_counter() - begin)


torch.library.define(
    "trial::see",
    "(Tensor(a!) acc, Tensor(b!) ext, Tensor control, Tensor q, Tensor k, Tensor v, Tensor out, bool c) -> ()",
    tags=[torch.Tag.flexible_layout],
)
torch.library.impl("trial::see", "CompositeExplicitAutograd", run)
torch.library.register_fake("trial::see", lambda *_: None)
see = torch.ops.trial.see.default


class Seen(Block):
    state = None

    def forward(self, x):
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1)
        )
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        state = self.__dict__.get("held")
        if state is not None:
            see(state.acc, state.ext, CONTROL, q.detach(), k.detach(), v.detach(), attended.detach(), True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


def main():
    print(torch.__version__, triton.__version__)
    for mode in ("reduce-overhead", "default"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        counters.clear()
        x = torch.randn(1, 1024, 768, device="cuda", dtype=torch.bfloat16)
        models = []
        for watched in (False, True):
            torch.manual_seed(0)
            model = nn.Sequential(*(Seen(768, 12) for _ in range(12))).to("cuda", torch.bfloat16)
            for block in model:
                block.__dict__["held"] = State() if watched else None
            models.append((model, torch.compile(model, mode=mode, fullgraph=True)))

        def step(i):
            model, run = models[i]
            model.zero_grad()
            if i and mode == "reduce-overhead":
                CONTROL.fill_(1)
            out = run(x)
            out.float().square().mean().backward()
            return [out.detach().clone(), *(p.grad.detach().clone() for p in model.parameters())]

        for _ in range(4):
            same = [torch.equal(a, b) for a, b in zip(step(0), step(1))]
        before = models[1][0][3].__dict__["held"].acc.flatten()[0].item()
        for _ in range(5):
            step(1)
        after = models[1][0][3].__dict__["held"].acc.flatten()[0].item()
        print(mode, "all equal", all(same), "counted", (after - before) / 5, "skips", dict(counters["inductor"]),
              "graphs", counters["stats"]["unique_graphs"], flush=True)
        CONTROL.fill_(0)
        times = [[], []]
        for _ in range(60):
            for i in (0, 1):
                model, run = models[i]
                torch.cuda.synchronize()
                begin = time.perf_counter()
                model.zero_grad()
                if i:
                    CONTROL.fill_(0)
                run(x).float().square().mean().backward()
                torch.cuda.synchronize()
                times[i].append(1e3 * (time.perf_counter() - begin))
        print(mode, "plain %.3f with %d idle launches %.3f ms" % (statistics.median(times[0]), LAUNCHES, statistics.median(times[1])))
        if host:
            print("op host us", 1e6 * statistics.median(host[-100:]))
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(1000):
        CONTROL.fill_(3)
    print("fill_ us", 1e3 * (time.perf_counter() - begin))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(60):
            idle[(192, 1, 1)](CONTROL, x, 1)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    graph.replay()
    start.record()
    for _ in range(10):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    print("idle launch in a graph us", 1e3 * start.elapsed_time(end) / 600)
    print("wait")


main()
