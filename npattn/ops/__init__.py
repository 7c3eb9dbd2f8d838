"""The ops, one file for each op or family of ops. The public names are in ``npattn``; nothing is exported here."""
