"""Step time and peak memory of private training over plain training: models, contenders, measures, table, picture."""
