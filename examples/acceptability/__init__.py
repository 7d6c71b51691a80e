"""A small linguistic-acceptability task: is this English sentence acceptable or not?

It has the shape of CoLA and the minimal pairs of BLiMP, but no text of either: the word lists and the templates were
written for this project and come under its licence, Apache-2.0. Each template makes a pair, an acceptable sentence
(label 1) and a minimally different unacceptable one (label 0): one word exchanged, or the same words in another order.
Ten phenomena (`PHENOMENA`) contribute equally, and both sentences of a pair are in the same split.

Two things keep the task from being solved by looking words up:

* the templates are crossed (a singular subject with "smiles" and "*smile", a plural one with "smile" and "*smiles"), so
  no word tells the label, whatever the phenomenon;
* the training and the held-out sentences are filled from disjoint lexicons (`LEXICONS`): they share the templates and
  the grammatical words (`FUNCTION_WORDS`), and no noun, name, verb, adjective or adverb.

`make_split` is deterministic in its seed. `python examples/acceptability` prints twenty samples.
"""

from acceptability.lexicon import FUNCTION_WORDS, LEXICONS, fillers, words
from acceptability.task import PHENOMENA, make_split

__all__ = ["FUNCTION_WORDS", "LEXICONS", "PHENOMENA", "fillers", "make_split", "words"]
