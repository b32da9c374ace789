"""The laboratory: attacks with harmless payloads, run on models of your own to measure what defences withstand."""
