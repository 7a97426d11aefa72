"""Everything that is to be seen on a GPU, in minutes: `bash bench/gpu.sh OUT`, explained in bench/README.md."""
