"""How many tokens a corpus's tokenizer has, before there is one."""

import json
from pathlib import Path

from mup_moe.config.settings import CorpusSettings
from mup_moe.encoding import read_text
from mup_moe.files import UserError

GPT2_VOCABULARY = 50_257
_GIVE = "give GPT-2's vocab.json and merges.txt, in this order, as `tokenizer_files`"


def vocabulary_of(corpus: CorpusSettings) -> int:
    """The tokens that a corpus's tokenizer will have; at most as many, where it is yet to be trained.

    Raises UserError where the files of the tokenizer are none.
    """
    if corpus.vocabulary is not None:
        return corpus.vocabulary
    if corpus.tokenizer_files is not None:
        path = Path(corpus.tokenizer_files[0]).expanduser()
        try:
            vocabulary = json.loads(read_text(path))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): {_GIVE}") from None
        if not isinstance(vocabulary, dict):
            raise UserError(f"{path} is no mapping of tokens to numbers: {_GIVE}")
        return len(vocabulary)
    return GPT2_VOCABULARY
