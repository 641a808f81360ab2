"""Greedy text of a checkpoint by vLLM, in a process of its own: `python run_vllm.py FOLDER < request > answer`.

The request: prompts (token ids) and the number of new tokens. The answer, on the last line: for each prompt the token
ids, and for each of them the log probability of each of the two likeliest tokens, by its id.
"""

import json
import os
import sys

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # it would bind to all cores but one, and finds none to bind to on two
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # an error ends this process, with its text
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main(folder: str) -> None:
    request = json.load(sys.stdin)
    from vllm import LLM, SamplingParams

    # float16 holds the stored scales as they are; bfloat16 would round them.
    model = LLM(folder, dtype="float16", enforce_eager=True, max_model_len=128, max_num_seqs=4, disable_log_stats=True)
    greedy = SamplingParams(temperature=0, max_tokens=request["new_tokens"], logprobs=2, ignore_eos=True)
    outputs = model.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], greedy, use_tqdm=False)
    answers = [output.outputs[0] for output in outputs]
    print(
        json.dumps(
            [
                {
                    "tokens": list(answer.token_ids),
                    "logprobs": [{token: of.logprob for token, of in step.items()} for step in answer.logprobs],
                }
                for answer in answers
            ]
        )
    )


if __name__ == "__main__":
    os.environ.update(SETTINGS)
    main(sys.argv[1])
