"""The ops, one file for each or for a family. The public names are those of ``npattn``; nothing is exported here."""
