"""The demonstration behind `make demo`: real handwritten digits through the whole AltCLIP recipe on a CPU."""
