"""A decode loop as a serving engine runs it: one CUDA graph replay per step of an 8-billion-parameter model.

Weights are random (their energy is what matters), batch 16, context 1024. Prints one JSON line with the step
times' percentiles. Needs torch with CUDA; knows nothing of jouletrace.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F  # noqa: N812  (torch's own habit)

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FEED_FORWARD, VOCABULARY = 32, 4096, 32, 8, 128, 14336, 128256


def make_step(batch: int, context: int) -> tuple[torch.cuda.CUDAGraph, object]:
    """Return a graph of one decode step for `batch` sequences with `context` tokens each, and what it works on.

    A graph holds addresses, not tensors: keep the second as long as the first.
    """

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16) * 0.02

    layers = [
        {
            "qkv": weight((HEADS + 2 * KV_HEADS) * HEAD_DIM, WIDTH),
            "out": weight(WIDTH, HEADS * HEAD_DIM),
            "up": weight(2 * FEED_FORWARD, WIDTH),
            "down": weight(WIDTH, FEED_FORWARD),
            "keys": weight(batch, KV_HEADS, context, HEAD_DIM),
            "values": weight(batch, KV_HEADS, context, HEAD_DIM),
        }
        for _ in range(LAYERS)
    ]
    head = weight(VOCABULARY, WIDTH)
    hidden = weight(batch, 1, WIDTH)

    def step() -> torch.Tensor:
        x = hidden
        for layer in layers:
            heads = F.rms_norm(x, (WIDTH,)) @ layer["qkv"].T
            query, key, value = heads.split([HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM], -1)
            layer["keys"][:, :, -1:] = key.view(batch, 1, KV_HEADS, HEAD_DIM).transpose(1, 2)
            layer["values"][:, :, -1:] = value.view(batch, 1, KV_HEADS, HEAD_DIM).transpose(1, 2)
            attended = F.scaled_dot_product_attention(
                query.view(batch, 1, HEADS, HEAD_DIM).transpose(1, 2), layer["keys"], layer["values"], enable_gqa=True
            )
            x = x + attended.transpose(1, 2).reshape(batch, 1, HEADS * HEAD_DIM) @ layer["out"].T
            gate, up = (F.rms_norm(x, (WIDTH,)) @ layer["up"].T).chunk(2, -1)
            x = x + (F.silu(gate) * up) @ layer["down"].T
        return (F.rms_norm(x[:, -1], (WIDTH,)) @ head.T).argmax(-1)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), torch.no_grad():
        step()
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        step()
    return graph, (layers, head, hidden)


def timed_steps(graph: torch.cuda.CUDAGraph, seconds: float) -> list[float]:
    """Replay the graph for a while; return each step's time in seconds, synchronised at both ends."""
    torch.cuda.synchronize()
    times = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        graph.replay()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return times


def percentile(times: list[float], percent: float) -> float:
    """Return a percentile of a list of times."""
    ordered = sorted(times)
    return ordered[min(int(len(ordered) * percent / 100), len(ordered) - 1)]


def summary(times: list[float]) -> dict[str, float]:
    """Return count, mean and percentiles, milliseconds."""
    return {
        "steps": len(times),
        "mean_ms": sum(times) / len(times) * 1e3,
        "p50_ms": percentile(times, 50) * 1e3,
        "p99_ms": percentile(times, 99) * 1e3,
        "p99.9_ms": percentile(times, 99.9) * 1e3,
    }


def main() -> None:
    """Serve commands from standard input: each line a number of seconds, answered by one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    graph, kept = make_step(options.batch, options.context)
    timed_steps(graph, 3.0)
    print("ready", flush=True)
    while True:
        try:
            line = input()
        except EOFError:
            del kept
            return
        print(json.dumps(summary(timed_steps(graph, float(line)))), flush=True)


if __name__ == "__main__":
    main()
