"""Published claims about weight surgery, tried again at small scale with this tool: `python examples/evidence/run.py`."""
