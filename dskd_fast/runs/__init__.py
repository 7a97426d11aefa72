"""The run folder: the options that decide a result, its files, its history."""
