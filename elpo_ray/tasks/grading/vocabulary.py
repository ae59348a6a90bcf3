"""Spellings: characters and LaTeX commands that say the same, units, words that are no units."""

from __future__ import annotations

SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋", "0123456789+-")
_SIGNS = r"""
× \times  ✕ \times  · \cdot  ⋅ \cdot  ∙ \cdot  • \cdot  ÷ \div  ± \pm  ∓ \mp  ≤ \leq  ⩽ \leq
≥ \geq  ⩾ \geq  ≠ \neq  ≈ \approx  ∞ \infty  ∪ \cup  ∩ \cap  ∖ \setminus  ∅ \emptyset  ∈ \in
∨ \lor  ∧ \land  … \ldots  ⟨ \langle  ⟩ \rangle  〈 \langle  〉 \rangle  ‰ \permil  μ \mu  Å \AA
→ \to  α \alpha  β \beta  γ \gamma  δ \delta  ε \epsilon  ζ \zeta  η \eta  θ \theta  κ \kappa
λ \lambda  ν \nu  ξ \xi  π \pi  ρ \rho  σ \sigma  τ \tau  φ \phi  χ \chi  ψ \psi  ω \omega
Γ \Gamma  Δ \Delta  Θ \Theta  Λ \Lambda  Ξ \Xi  Π \Pi  Σ \Sigma  Φ \Phi  Ψ \Psi  Ω \Omega
""".split()  # noqa: SIM905
_CHARACTERS = r"""
° ^{\circ}  º ^{\circ}  ℝ \mathbb{R}  ℤ \mathbb{Z}  ℕ \mathbb{N}  ℚ \mathbb{Q}  ℂ \mathbb{C}
− -  – -  — -  ‐ -  ‑ -  ∕ /  ⁄ /  ′ '  ’ '  ‘ '  “ "  ” "  ： :  。 .  ％ \%
""".split()  # noqa: SIM905
UNICODE = str.maketrans(
    {mark: f"{command} " for mark, command in zip(_SIGNS[::2], _SIGNS[1::2], strict=True)}
    | dict(zip(_CHARACTERS[::2], _CHARACTERS[1::2], strict=True))
    | {
        "\u2126": r"\Omega ",
        "\xb5": r"\mu ",
        "\u212b": r"\AA ",
        "\xa0": " ",
        "，": ", ",
        "；": "; ",
    }
    | {chr(code): "" for code in (0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF, 0x00AD, 0x00AF)}
)
"""LaTeX for characters; sub- and superscripts are seen to before."""
_SAME = {
    r"\frac": "dfrac tfrac cfrac nicefrac sfrac",
    r"\leq": "le leqslant leqq",
    r"\geq": "ge geqslant geqq",
    r"\neq": "ne",
    "<": "lt",
    ">": "gt",
    r"\ldots": "dots cdots dotsc dotsb hdots",
    r"\emptyset": "varnothing O",
    r"\cdot": "ast bullet",
    "|": "lvert rvert vert",
    r"\{": "lbrace",
    r"\}": "rbrace",
    "[": "lbrack",
    "]": "rbrack",
    "(": "lparen",
    ")": "rparen",
    r"\lor": "vee",
    r"\land": "wedge",
    r"\setminus": "backslash smallsetminus",
    r"^{\circ}": "degree degrees textdegree",
    r"\mathbb{R}": "R reals Reals",
    r"\mathbb{Z}": "Z",
    r"\mathbb{N}": "N",
    "i": "imath",
    r"\infty": "infin infinity",
    r"\approx": "simeq thickapprox cong",
    r"\in": "isin",
    r"\phi": "varphi",
    r"\epsilon": "varepsilon",
    r"\%": "percent",
    "€": "euro texteuro",
    "£": "pounds textsterling",
    r"\$": "textdollar",
    r"\text": "mbox textrm textnormal textsf texttt mathrm mathsf mathtt hbox textup emph textit "
    "mathit",
}
SYNONYMS = {name: command for command, names in _SAME.items() for name in names.split()}
"""Commands that say the same, by name."""
SILENT = frozenset(
    """
    displaystyle textstyle scriptstyle left right bigl bigr Bigl Bigr biggl biggr Biggl Biggr big
    Big bigg Bigg large Large LARGE huge Huge small normalsize limits nolimits strut itshape
    bfseries bf it rm quad qquad enspace thinspace thickspace medspace hfill noindent middle
    allowbreak nobreak mathstrut negthinspace
    """.split()  # noqa: SIM905
)
"""Commands that only say how something looks."""
_PREFIXES = ("", "k", "M", "G", "T", "c", "d", "m", "n", "p", "f", "h", r"\mu ", "da")
_BASE = """
m g s A K mol cd Hz N Pa J W C V F S Wb T H lm lx Bq Gy L l eV bar cal b B
""".split()  # noqa: SIM905
_OTHER = r"""
min hr hrs sec secs day days yr yrs ft in yd mi mph kph kmph kmh lb lbs oz gal qt pt rad deg atm
torr mmHg dB rpm ppm ha sq cu u amu Da gm gms Wh kWh MWh rev USD EUR GBP CNY RMB INR Rs cc fps psi
dL cL mL mEq unit units pts px AU \Omega k\Omega M\Omega \AA Ohm ohm
""".split()  # noqa: SIM905
UNITS = frozenset(prefix + base for prefix in _PREFIXES for base in _BASE) | frozenset(_OTHER)
UNIT_LETTERS = frozenset("mgshKNJWVACLlTFHS")
"""Units of one letter; the other letters are unknowns."""
UNSURE_UNITS = frozenset(
    "mg ms as fs ps ns ab ha pt in us hs ml mb nb pb fb cs ds hl dl kl Ml".split()  # noqa: SIM905
)
"""Units that could as well be a product of unknowns when they touch the number."""
NO_UNIT = frozenset(
    """
    not no non if when where than least most more less times plus minus by mod modulo
    squared cubed factorial half halves third thirds quarter quarters fourth fourths fifth fifths
    sixth sixths eighth eighths tenth tenths hundredth hundredths thousandth thousandths dozen
    dozens hundred hundreds thousand thousands million millions billion billions trillion
    trillions percent percentage pct pi sin cos tan log ln exp sqrt infinity inf choose divided
    multiplied except excluding without negative base st nd rd xor
    """.split()  # noqa: SIM905
)
"""Words that change what a number says."""
MULTIPLIERS = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9,
               "trillion": 10**12}  # fmt: skip
NAMED_SETS = {
    r"\emptyset": ("no solution", "no solutions", "no real solution", "no real solutions",
                   "empty set", "the empty set"),
    r"\mathbb{R}": ("all real numbers", "all reals", "real numbers"),
}  # fmt: skip
"""Words for sets of numbers."""
BASES = {"two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7",
         "eight": "8", "nine": "9", "ten": "10", "twelve": "12", "sixteen": "16"}  # fmt: skip
