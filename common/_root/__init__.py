"""fedmerge: federated and continual model merging.

Sites fine-tune one shared pretrained model on their own tasks and send only task vectors; the
server folds each one into a single global model and keeps constant state however many arrive.
"""

from importlib.metadata import version

__version__ = version("fedmerge")
