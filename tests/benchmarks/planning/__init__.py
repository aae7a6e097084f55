"""How good the planner's predictions are, and where its constants come from."""
