"""RA-Rec: pre-trained ID embeddings as soft prompts in every block of a frozen language model.

Data flows one way through the rooms of this package; a room imports only from rooms before it:
config -> data -> ranking -> ids -> prompts -> models -> training -> evaluation -> serving.
`rarec.stages` puts them together, one module a stage; `rarec.sweep` runs them many times; `rarec.cli` is a thin shell.
"""

__version__ = "0.1.0"
