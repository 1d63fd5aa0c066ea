"""The chat formats that need no template. Scaffolding is written as ids; contents are only ever encoded as text."""

from __future__ import annotations

from llama_dist.text.base import Tokenizer
from llama_dist.text.dialog import Dialog, in_turns, refusal

_LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")


def has_special_tags(dialog: Dialog) -> bool:
    """Whether a content holds a tag of Llama 2's format: Meta's `chat_completion` answers such a dialog by an error."""
    return any(tag in message["content"] for message in dialog for tag in _LLAMA2_TAGS)


def encode_llama2(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """Llama 2 (meta-llama/llama, generation.py): `<s>[INST] <<SYS>>..<</SYS>> user [/INST] answer </s><s>[INST] ..`."""
    if has_special_tags(dialog):
        raise refusal(f"special tags are not allowed in messages: {', '.join(_LLAMA2_TAGS)}")
    system, turns = in_turns(dialog)
    if system is not None:
        turns[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{turns[0]}"
    ids: list[int] = []
    for user, answer in zip(turns[::2], turns[1::2], strict=False):
        ids += tokenizer.encode(f"[INST] {user.strip()} [/INST] {answer.strip()} ", bos=True, eos=True)
    return ids + tokenizer.encode(f"[INST] {turns[-1].strip()} [/INST]", bos=True, eos=False)


def encode_llama3(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """Llama 3 (meta-llama/llama3, tokenizer.py, ChatFormat): a header with the role, the stripped content, eot."""
    special = tokenizer.special

    def header(role: str) -> list[int]:
        name = tokenizer.encode("ipython" if role == "tool" else role, bos=False, eos=False)
        blank = tokenizer.encode("\n\n", bos=False, eos=False)
        return [special["<|start_header_id|>"], *name, special["<|end_header_id|>"], *blank]

    ids = tokenizer.encode("", bos=True, eos=False)
    for message in dialog:
        ids += header(message["role"])
        ids += tokenizer.encode(message["content"].strip(), bos=False, eos=False)
        ids.append(special["<|eot_id|>"])
    return ids + header("assistant")


def encode_chatml(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """ChatML (OpenAI's chatml.md): `<|im_start|>role`, the content on the next line, `<|im_end|>`. No system prompt
    is made up where the dialog has none."""
    start, end = tokenizer.special["<|im_start|>"], tokenizer.special["<|im_end|>"]
    ids = tokenizer.encode("", bos=tokenizer.add_bos, eos=False)
    for message in dialog:
        text = tokenizer.encode(f"{message['role']}\n{message['content']}", bos=False, eos=False)
        ids += [start, *text, end, *tokenizer.encode("\n", bos=False, eos=False)]
    return [*ids, start, *tokenizer.encode("assistant\n", bos=False, eos=False)]


def encode_mistral(tokenizer: Tokenizer, dialog: Dialog) -> list[int]:
    """Mistral (mistralai/mistral-common, instruct tokenizers 1 to 7): `<s>[INST] user [/INST] answer</s>[INST] ..`.

    Where the vocabulary has [INST] as a control token (2 and on) contents stand between those ids and the system
    prompt goes to the last user turn, or between its own tokens where there are such (7). Without them (1) [INST] is
    text and the system prompt goes to the first turn.
    """
    system, turns = in_turns(dialog)
    special = tokenizer.special
    ids = tokenizer.encode("", bos=True, eos=False)
    tagged = "[INST]" in special and "[/INST]" in special
    if system is not None and tagged and "[SYSTEM_PROMPT]" in special:
        text = tokenizer.encode(system, bos=False, eos=False)
        ids += [special["[SYSTEM_PROMPT]"], *text, special["[/SYSTEM_PROMPT]"]]
    elif system:
        at = -1 if tagged else 0
        turns[at] = f"{system}\n\n{turns[at]}"
    for at, content in enumerate(turns):
        if at % 2:
            ids += tokenizer.encode(content, bos=False, eos=True)
        elif tagged:
            ids += [special["[INST]"], *tokenizer.encode(content, bos=False, eos=False), special["[/INST]"]]
        else:
            ids += tokenizer.encode(f"[INST] {content} [/INST]", bos=False, eos=False)
    return ids
