"""Log probabilities of checkpoints by vLLM, a process each, forked from one that has it imported.

Each line of stdin asks for a checkpoint: its folder, the dtype to compute in, whether it brings Python code of its own,
the prompt (token ids), the number of new tokens, and the file to write the answer to: the new tokens, and log
probabilities [T, V] behind each token of the prompt and of the text but the last. A line of stdout follows each: 0, or
else what the process ended with.
"""

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from interop.run_vllm import SETTINGS


def answer(request: dict[str, Any]) -> None:
    """Load the checkpoint, pass the prompt, write on greedily."""
    from vllm import LLM, SamplingParams

    model = LLM(
        request["folder"],
        dtype=request["dtype"],
        trust_remote_code=request["own_code"],
        enforce_eager=True,
        max_model_len=128,
        max_num_seqs=4,
        max_logprobs=-1,
        disable_log_stats=True,
    )
    greedy = SamplingParams(
        temperature=0, max_tokens=request["new_tokens"], logprobs=-1, prompt_logprobs=-1, ignore_eos=True
    )
    [output] = model.generate([{"prompt_token_ids": request["prompt"]}], greedy, use_tqdm=False)
    steps = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]
    rows = [[step[token].logprob for token in range(len(step))] for step in steps]
    Path(request["answer"]).write_text(json.dumps({"tokens": list(output.outputs[0].token_ids), "logprobs": rows}))


def main() -> None:
    import vllm  # noqa: F401 (once, before all forks)

    ended = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM's own words
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                answer(json.loads(line))
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=ended, flush=True)


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    main()
