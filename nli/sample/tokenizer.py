"""The tiny Mistral's tokenizer: byte-level BPE trained on the sample world's language, framed by the special tokens of Mistral's v3.

    tokenizer.tokenize("[INST] Premise: A beagle slept.")   ["[INST]", "ĠPremise", ":", "ĠA", "Ġbeagle", "Ġslept", "."]

All 256 bytes are in the vocabulary, so any text comes back byte for byte. What every training text repeats word for word, the instruction and the JSON
around a thought, is one token each: the tiny model then spends its short context, and a laptop its time, on the pair and the thought.
"""

from collections.abc import Iterable
from itertools import islice

from nli.sample.world import generate_pairs
from nli.task.prompts import INSTRUCTION, render_completion, render_student_prompt

VOCABULARY_SIZE = 960
UNKNOWN, BOS, EOS, INST, END_INST = "<unk>", "<s>", "</s>", "[INST]", "[/INST]"
PAD = "[control_8]"
SPECIAL_TOKENS = [UNKNOWN, BOS, EOS, INST, END_INST, *(f"[control_{number}]" for number in range(8, 12))]
_NUM_PAIRS = 20_000


def _frame_texts() -> list[str]:
    """The instruction, and the completion's JSON before the thought and between thought and label."""
    before, _, rest = render_completion("|", 0).partition("|")
    between = rest[: rest.index("0")]
    return [INSTRUCTION, f" {before}", between]


def build_tokenizer():
    """A PreTrainedTokenizerFast, the same one every time."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    frames = _frame_texts()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(frames),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_training_texts(frames), trainer)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in frames])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token not in (UNKNOWN, BOS, EOS, PAD)],
        clean_up_tokenization_spaces=False,
        model_max_length=512,
        padding_side="right",
    )


def _training_texts(frames: list[str]) -> Iterable[str]:
    for pair in islice(generate_pairs(seed=0), _NUM_PAIRS):
        text = render_student_prompt(pair.premise, pair.hypothesis) + " " + render_completion(pair.thought, pair.label)
        for part in (INST, END_INST, *frames):
            text = text.replace(part, "\n")
        yield text


def encode_example(tokenizer, prompt: str, completion: str = "") -> list[int]:
    """Token ids of a prompt, or of a prompt with its completion and EOS, after one BOS."""
    text = f"{prompt} {completion}" if completion else prompt
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [tokenizer.bos_token_id, *ids, *([tokenizer.eos_token_id] if completion else [])]
