"""Names of what a run leaves in its folder beside the checkpoints."""

HISTORY = "history.jsonl"
RECORD = "run.json"
PAGE = "run_report.html"
