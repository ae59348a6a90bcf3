"""A shop: a price list to search, a cart to fill, a customer with a budget."""

from pathlib import Path

PRICES: dict[str, dict[str, int]] = {}
for line in (Path(__file__).parent / "prices.txt").read_text().splitlines():
    thing, brand, price = line.split()
    PRICES.setdefault(thing, {})[brand] = int(price)


def search(thing: str) -> str:
    """Look up what a thing costs.

    Args:
        thing: one word, such as milk
    """
    return ", ".join(f"{brand} {price}" for brand, price in PRICES[thing].items())


class Cart:
    """What the customer buys. It is made for each trajectory, and copied where they branch."""

    def reset(self, budget: int, wanted: list[str], **row) -> None:
        self.left, self.missing = budget, set(wanted)

    def add(self, thing: str, brand: str) -> str:
        """Put a thing into the cart.

        Args:
            thing: one word, such as milk
            brand: one of the brands that the search shows
        """
        self.left -= PRICES[thing][brand]
        self.missing.discard(thing)
        return f"left: {self.left}"

    def reward(self) -> bool:
        return not self.missing and self.left >= 0
