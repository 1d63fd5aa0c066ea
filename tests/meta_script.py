"""As a user of Meta's `llama` package would write it; only the import differs."""

from __future__ import annotations

import fire

from llama_dist import Dialog, Llama


def main(ckpt_dir: str, tokenizer_path: str, max_seq_len: int = 64, max_batch_size: int = 4) -> None:
    generator = Llama.build(
        ckpt_dir=ckpt_dir, tokenizer_path=tokenizer_path, max_seq_len=max_seq_len, max_batch_size=max_batch_size
    )
    prompts = ["I believe the meaning of life is", "Simply put, the theory of relativity states that ", "a"]
    results = generator.text_completion(prompts, max_gen_len=8, temperature=0.6, top_p=0.9)
    for prompt, result in zip(prompts, results, strict=True):
        print(f"{prompt}\n==> {result['generation']!r}\n")
    dialogs: list[Dialog] = [[{"role": "user", "content": "what is the recipe of mayonnaise?"}]]
    for result in generator.chat_completion(dialogs, max_gen_len=None, temperature=0, top_p=0.9):
        print(f"{result['generation']['role'].capitalize()}: {result['generation']['content']!r}")
    ids = [generator.tokenizer.encode(p, bos=True, eos=False) for p in prompts]
    tokens, logprobs = generator.generate(ids, max_gen_len=4, logprobs=True)
    assert logprobs is not None and [len(t) for t in tokens] == [len(x) for x in logprobs]


if __name__ == "__main__":
    fire.Fire(main)
