"""The proxy that fails on purpose: it is of the kit that everybody may use."""

from poolkeeper.testing import FaultProxy as FaultProxy
