"""The leaderboard: evaluation records of many runs, ranked by protocol, in the terminal and on one page."""
