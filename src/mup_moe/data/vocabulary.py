"""How many tokens a corpus's tokenizer has, before there is one."""

from pathlib import Path

from mup_moe.config.settings import CorpusSettings
from mup_moe.files import read_json

GPT2_VOCABULARY = 50_257


def vocabulary_of(corpus: CorpusSettings) -> int:
    """The tokens that a corpus's tokenizer will have; at most as many, where it is yet to be trained."""
    if corpus.vocabulary is not None:
        return corpus.vocabulary
    if corpus.tokenizer_files is not None:
        return len(read_json(Path(corpus.tokenizer_files[0]).expanduser()))
    return GPT2_VOCABULARY
