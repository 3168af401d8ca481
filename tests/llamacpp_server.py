"""The real llama.cpp server as a program: `python -m tests.llamacpp_server MODEL PORT [KEY]`, until it is killed.

KEY is that of its `--api-key`. Needs xllamacpp. Scrape, proxy and client are tested against it.
"""

import signal
import sys

import xllamacpp


def main() -> None:
    """Serve a model on a loopback port."""
    params = xllamacpp.CommonParams()
    params.model.path = sys.argv[1]
    params.endpoint_metrics = True
    params.n_parallel = 4
    params.n_ctx = 4 * 2048
    params.cpuparams.n_threads = 1
    params.hostnames = ["127.0.0.1"]
    params.port = int(sys.argv[2])
    params.api_keys = sys.argv[3:]
    server = xllamacpp.Server(params)  # It serves as long as this object lives.
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
