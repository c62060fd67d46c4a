"""IDP rows: documents with their gold JSON -> data/idp_sft.jsonl, data/idp_kd.jsonl, data/idp_dpo.jsonl.

    python idp_prepare.py --src data/idp_corpus.jsonl --schema data/idp_schema.json --outdir data

From few documents --copies 6 makes more: the same ones with values of others. The corpus that comes with the
repository is generated, the same for the same seed (a second on a CPU):

    python idp_prepare.py --synthesize 600 --src data/idp_corpus.jsonl --schema data/idp_schema.json --outdir data

A corpus row is {"document", "gold"[, "group"]}. The group owns the template; without one it is the gold's company.
No group is on both sides of the split, and no held-out row is written. eval_idp.py reaches the same split from the
same file, seed and fraction.
"""

import argparse
import random
import re
from collections import Counter
from datetime import date, timedelta
from pathlib import Path

from common import (
    SEED,
    UserError,
    between,
    cli,
    dev_split,
    group_hash,
    holdout,
    read_json,
    read_rows,
    row_hash,
    write_jsonl,
)
from distill.idp_decode import check_schema, validator
from infer_idp import compact, idp_prompt, in_schema_order

# ---------------------------------------------------------------------------------------------------------------------
# Generated invoices and receipts


WORDS = "invoice|receipt|number|date|item|quantity|price|amount|subtotal|tax|total|thanks"
LABELS = {
    "en": "Invoice|Receipt|No.|Date|Description|Qty|Price|Amount|Subtotal|VAT|TOTAL|Thank you for your business",
    "de": "Rechnung|Kassenbon|Nr.|Datum|Bezeichnung|Menge|Preis|Betrag|Zwischensumme|MwSt.|GESAMT|Vielen Dank",
    "fr": "Facture|Ticket|N°|Date|Désignation|Qté|Prix|Montant|Sous-total|TVA|TOTAL TTC|Merci de votre visite",
    "es": "Factura|Recibo|Núm.|Fecha|Descripción|Cant.|Precio|Importe|Base imponible|IVA|TOTAL|Gracias por su visita",
    "it": "Fattura|Scontrino|N.|Data|Descrizione|Qtà|Prezzo|Importo|Imponibile|IVA|TOTALE|Grazie e arrivederci",
}
GOODS = {
    "en": "Printer paper A4|USB cable 2m|Desk lamp|Coffee beans 1kg|Steel bolts M8|Hourly consulting|Window cleaning",
    "de": "Druckerpapier A4|Schreibtischlampe|Kaffeebohnen 1kg|Schrauben M8|Beratung je Stunde|Glühbirne E27|Ordner",
    "fr": "Papier A4|Lampe de bureau|Café en grains 1kg|Câble USB 2m|Heure de conseil|Cahier à spirale|Ampoule LED",
    "es": "Papel A4|Lámpara de mesa|Café en grano 1kg|Cable USB 2m|Hora de asesoría|Cuaderno|Bombilla LED|Tornillos",
    "it": "Carta A4|Lampada da tavolo|Caffè in grani 1kg|Cavo USB 2m|Ora di consulenza|Quaderno|Viti M8|Nastro adesivo",
}
NAMES = "Alder Birch Cobalt Delta Ember Falcon Grove Harbor Iris Juniper Kestrel Linden Maple Nimbus Orchard Pioneer"
TRADES = "Trading Supplies Hardware Foods Electric Services Print Logistics Stationery Garden Optics Tools"
FORMS = {"en": ["Ltd", "Inc.", "Sdn Bhd"], "de": ["GmbH", "AG"], "fr": ["SARL", "SA"], "es": ["S.L."], "it": ["S.r.l."]}
SIGNS = {"EUR": "€", "USD": "$", "GBP": "£", "CHF": "CHF", "MYR": "RM"}
CURRENCIES = {
    "en": ["GBP", "USD", "MYR", "EUR"],
    "de": ["EUR", "CHF"],
    "fr": ["EUR", "CHF"],
    "es": ["EUR"],
    "it": ["EUR"],
}
MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def template(rng):
    """What all documents of one company share: language, currency, layout, and the fields that it never prints."""
    language = rng.choice(list(LABELS))
    return {
        "company": f"{rng.choice(NAMES.split())} {rng.choice(TRADES.split())} {rng.choice(FORMS[language])}",
        "language": language,
        "currency": rng.choice(CURRENCIES[language]),
        "type": rng.choice(["invoice", "receipt"]),
        "date_format": rng.choice(["%d/%m/%Y", "%d.%m.%Y", "%Y-%m-%d", "%d-%m-%y", "%d month %Y"]),
        "comma": language != "en",  # 1.234,56
        "upper": rng.random() < 0.3,
        "columns": rng.choice(["aligned", "spaces", "two lines", "amount only"]),
        "street": f"{rng.randint(1, 199)} {rng.choice(NAMES.split())} {rng.choice(['Street', 'Road', 'Weg', 'Via'])}",
        "absent": {f for f in ("number", "date", "subtotal", "tax", "company", "total") if rng.random() < 0.12},
        "paid_line": rng.random() < 0.4,  # cash and change: numbers that are not the total
    }


def synthesize(n, seed):
    """n corpus rows of about n / 8 companies; the same for the same n and seed."""
    rng = random.Random(seed)
    templates = {(t := template(rng))["company"]: t for _ in range(max(n // 8, 2))}  # one template a company
    return [synthetic_row(rng.choice(list(templates.values())), rng) for _ in range(n)]


def synthetic_row(t, rng):
    """One document in the template's layout, and its gold: what is not printed is null."""
    words = dict(zip(WORDS.split("|"), LABELS[t["language"]].split("|"), strict=True))
    items = []
    for description in rng.sample(GOODS[t["language"]].split("|"), rng.randint(1, 5)):
        quantity, price = rng.randint(1, 12), rng.randint(50, 30000) / 100
        items.append({"description": description, "quantity": quantity, "unit_price": price})
        items[-1]["amount"] = round(quantity * price, 2)
    subtotal = round(sum(i["amount"] for i in items), 2)
    tax = round(subtotal * rng.choice([0.05, 0.07, 0.19, 0.2, 0.21]), 2)
    day = date(2015, 1, 1) + timedelta(days=rng.randrange(3650))
    gold = {
        "type": t["type"],
        "company": t["company"],
        "number": f"{rng.choice(['', 'INV-', 'R', '2024/'])}{rng.randint(100, 99999)}",
        "date": day.isoformat(),
        "currency": t["currency"] if rng.random() < 0.9 else None,
        "items": items,
        "subtotal": subtotal,
        "tax": tax,
        "total": round(subtotal + tax, 2),
    }
    gold |= dict.fromkeys(t["absent"])
    if t["columns"] == "amount only":
        gold["items"] = [{**i, "quantity": None, "unit_price": None} for i in items]

    def money(x):
        text = f"{x:,.2f}"
        return text.translate(str.maketrans(",.", ".,")) if t["comma"] else text

    printed_date = day.strftime(t["date_format"]).replace("month", MONTHS[day.month - 1])
    bad_scan = rng.random() < 0.15  # misread in text fields too, and the gold is what was printed

    def scanned(text):
        return ocr_noise(text, rng, rate=0.05) if bad_scan else text

    header = [scanned(gold["company"]), t["street"]] if gold["company"] else [t["street"]]
    header += [words[t["type"]] + (f" {words['number']} {gold['number']}" if gold["number"] else "")]
    header += [f"{words['date']}: {printed_date}"] if gold["date"] else []
    if rng.random() < 0.3:
        header[1:] = rng.sample(header[1:], len(header) - 1)
    sign = SIGNS[t["currency"]] if gold["currency"] else ""
    sums = [(words[k], gold[k]) for k in ("subtotal", "tax", "total") if gold[k] is not None]
    if t["paid_line"] and gold["total"]:
        cash = float(-(-gold["total"] // 10) * 10)
        sums += [("CASH", cash), ("CHANGE", round(cash - gold["total"], 2))]
    items = [{**i, "description": scanned(i["description"])} for i in gold["items"]]
    lines = [*header, *item_lines(t, items, words, money)]
    lines += [f"{label}{rng.choice([': ', ' ', '  ....  '])}{sign} {money(x)}".rstrip() for label, x in sums]
    lines.append(ocr_noise(words["thanks"], rng))
    if rng.random() < 0.3:
        lines.insert(len(header), ocr_noise("-" * rng.randint(8, 30), rng))
    text = "\n".join(re.sub(" +", lambda m: m[0] + " " * (rng.random() < 0.05), line) for line in lines)
    text = text.upper() if t["upper"] else text
    if t["upper"]:  # the gold has the document's case
        gold["company"] = gold["company"] and gold["company"].upper()
        gold["number"] = gold["number"] and gold["number"].upper()
        gold["items"] = [{**i, "description": i["description"].upper()} for i in gold["items"]]
    return {"document": text, "gold": gold, "group": t["company"]}


def item_lines(t, items, words, money):
    """The lines of the item table in the template's layout."""
    if t["columns"] == "amount only":
        return [f"{i['description']} {money(i['amount'])}" for i in items]
    if t["columns"] == "two lines":
        return [
            f"{i['description']}\n  {i['quantity']} x {money(i['unit_price'])} = {money(i['amount'])}" for i in items
        ]
    rows = [[i["description"], str(i["quantity"]), money(i["unit_price"]), money(i["amount"])] for i in items]
    rows.insert(0, [words[k] for k in ("item", "quantity", "price", "amount")])
    if t["columns"] == "spaces":
        return [" ".join(r) for r in rows]
    return [f"{a:<22}{b:>6}{c:>12}{d:>12}" for a, b, c, d in rows]


def ocr_noise(text, rng, rate=0.15):
    """Confused and lost characters; not for numbers and dates, whose right value no reader could tell."""
    confused = {"O": "0", "o": "c", "l": "1", "i": "l", "e": "c", "a": "o", "n": "ri", "-": "_", "u": "v", "r": ""}
    return "".join(confused.get(c, c) if rng.random() < rate else c for c in text)


# ---------------------------------------------------------------------------------------------------------------------
# Rows


def read_corpus(path, schema, group_field):
    """Corpus rows, each with its gold checked against the schema and its group.

    Errors: UserError naming the row and the gold's first fault.
    """
    judge = validator(schema)
    rows = read_rows(path, {"document": str, "gold": (dict, list)}, {"group": str})
    for i, row in enumerate(rows, 1):
        error = next(judge.iter_errors(row["gold"]), None)
        if error:
            raise UserError(f"{path}: row {i}: gold {error.json_path}: {error.message[:120]}")
        if not row.get("group"):
            owner = row["gold"].get(group_field) if isinstance(row["gold"], dict) else None
            # one spelling of a company; a document without one is its own group
            row["group"] = re.sub(r"\W+", "", str(owner)).upper() if owner else row_hash(row["document"])
    return rows


def mistakes(gold, document):
    """Plausible wrong answers, as (name, value): what a reader of the document gets wrong, each in one place."""
    if not isinstance(gold, dict):
        return []
    numeric = [k for k, v in gold.items() if re.fullmatch(r"-?\d+[.,]\d+|-?\d+", str(v))]
    out = [("swapped numbers", {**gold, a: gold[b], b: gold[a]}) for a in numeric for b in numeric if a < b]
    for key, value in gold.items():
        if key in numeric and key.lower() == "total":
            others = re.findall(r"\d+\.\d\d\b", document)
            out += [("other number", {**gold, key: type(value)(x)}) for x in others]
        if isinstance(value, list) and value:
            out += [("missing item", {**gold, key: value[:i] + value[i + 1 :]}) for i in range(len(value))]
        if isinstance(value, str) and (parts := re.fullmatch(r"(\d{4})-(\d\d)-(\d\d)", value)):
            out.append(("swapped day and month", {**gold, key: f"{parts[1]}-{parts[3]}-{parts[2]}"}))
        if isinstance(value, str) and (parts := re.fullmatch(r"(\d\d)([/.-])(\d\d)[/.-](\d{2,4})", value)):
            out.append(("date format", {**gold, key: f"{parts[4]}{parts[2]}{parts[3]}{parts[2]}{parts[1]}"}))
        if isinstance(value, str) and len(value.split()) > 2:
            out.append(("text cut short", {**gold, key: " ".join(value.split()[:-1])}))
        if value is not None and not isinstance(value, list):
            out.append(("missing value", {**gold, key: None}))
    return out


def exchanged(row, pool, rng):
    """The row with about half of the values that its document shows letter for letter taken from other documents.

    From few documents a model learns where each template puts a value; with values that come and go it has to learn
    what a value looks like. A document's other places that show the same value change with it; an exchange that would
    take away another field's value is not made.
    pool: {field: values to draw from}, as shown_values gives it.
    """
    for key in pool:
        if shows(row, key) and rng.random() < 0.5:
            value, gold = rng.choice(pool[key]), row["gold"]
            document = standing_alone(gold[key]).sub(lambda _, value=value: value, row["document"])
            other = {**row, "document": document, "gold": {**gold, key: value}}
            row = other if all(shows(other, k) for k in gold if shows(row, k)) else row
    return row


def shown_values(rows):
    """{field: the values of the rows whose documents show them}."""
    pool = {}
    for row in rows:
        for key in row["gold"]:  # of a list shows() takes none
            if shows(row, key):
                pool.setdefault(key, []).append(row["gold"][key])
    return pool


def shows(row, key):
    """Whether the document shows this value of the gold as it stands; a few letters could be there by chance."""
    value = row["gold"].get(key) if isinstance(row["gold"], dict) else None
    return isinstance(value, str) and len(value) > 3 and bool(standing_alone(value).search(row["document"]))


def standing_alone(value):
    """A pattern of the value where it is no part of a longer word, number or date (RM12.50 shows 12.50)."""
    before = r"(?<![\d.,/-])" if value[0].isdigit() else r"(?<!\w)"
    behind = r"(?!\d|[.,/-]\d)" if value[-1].isdigit() else r"(?!\w)"
    return re.compile(before + re.escape(value) + behind)


def rejected_answer(row, judge, rng):
    """(name, value) of a mistake that is valid JSON of the schema and not the gold; None where there is none."""
    by_name = {}
    for name, value in mistakes(row["gold"], row["document"]):
        if value != row["gold"] and judge.is_valid(value):
            by_name.setdefault(name, []).append(value)
    if not by_name:
        return None
    name = rng.choice(sorted(by_name))
    return name, rng.choice(by_name[name])


def main(args):
    schema = read_json(args.schema)
    check_schema(schema)
    if args.synthesize:
        write_jsonl(args.src, synthesize(args.synthesize, args.seed))
    rows = read_corpus(args.src, schema, args.group_field)
    answers = [row["gold"] for row in rows]
    if args.teacher:
        taught = read_rows(args.teacher, {"line": int, "output": (dict, list)})
        if [r["line"] for r in taught] != list(range(1, len(rows) + 1)):
            raise UserError(f"{args.teacher}: expected one result a row of {args.src}, as infer_idp.py writes them")
        answers = [r["output"] for r in taught]
    judge, rng = validator(schema), random.Random(args.seed)
    train, held = holdout([{**r, "teacher": a} for r, a in zip(rows, answers, strict=True)], args.seed, args.val_frac)
    if not train:
        raise UserError(f"{args.src}: all {len(rows)} rows are held out; expected more groups or a smaller --val_frac")
    train = [{**row, "group": group_hash(row["group"])} for row in train]
    own, _ = dev_split(train, args.seed)  # the trainers' development rows stay as they are and lend no value
    pool = shown_values(own)
    copies = [exchanged(row, pool, rng) for _ in range(args.copies) for row in own]
    # a teacher answered the documents as they were
    copies = [{**row, "teacher": None if args.teacher else row["gold"]} for row in copies]
    sft, kd, dpo, made = [], [], [], Counter()
    for row in train + copies:
        prompt, group = idp_prompt(schema, row["document"]), row["group"]
        gold = compact(in_schema_order(row["gold"], schema))
        sft.append({"input": prompt, "output": gold, "group": group})
        if row["teacher"] is not None:
            teacher = compact(in_schema_order(row["teacher"], schema))
            kd.append({"input": prompt, "teacher_output": teacher, "group": group})
        wrong = rejected_answer(row, judge, rng)
        made[wrong[0] if wrong else "none possible: no DPO row"] += 1
        if wrong:
            rejected = compact(in_schema_order(wrong[1], schema))
            dpo.append({"prompt": prompt, "chosen": gold, "rejected": rejected, "group": group})
    for name, out in (("sft", sft), ("kd", kd), ("dpo", dpo)):
        write_jsonl(args.outdir / f"idp_{name}.jsonl", out)
        print(f"{args.outdir}/idp_{name}.jsonl: {len(out)} rows")
    print(f"{len(train)} training documents and {len(copies)} copies with exchanged values")
    print(f"{len(held)} documents held out, {len({r['group'] for r in held})} groups of these")
    print("rejected answers:", ", ".join(f"{k} {n}" for k, n in made.most_common()))
    if not args.teacher:
        print("KD rows teach the gold itself; --teacher takes a larger model's answers from infer_idp.py")


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--src", required=True, type=Path, help='corpus: JSONL rows {"document", "gold"[, "group"]}')
    p.add_argument("--schema", required=True, type=Path, help="JSON Schema that every gold is checked against")
    p.add_argument("--outdir", required=True, type=Path, help="folder of idp_sft.jsonl, idp_kd.jsonl, idp_dpo.jsonl")
    p.add_argument("--synthesize", type=int, default=0, metavar="N", help="first write N generated rows to --src")
    p.add_argument("--teacher", type=Path, help="infer_idp.py's results on --src, for the KD rows (default: the gold)")
    p.add_argument(
        "--copies",
        type=between(int, 0, 1000),
        default=0,
        help="of each training document, with values of other documents in it and its gold (default 0)",
    )
    p.add_argument("--group_field", default="company", help="the gold's field that names the group (default company)")
    p.add_argument("--val_frac", type=float, default=0.33, help="share of the groups held out (default 0.33)")
    p.add_argument("--seed", type=int, default=SEED, help=f"of split, generation and mistakes (default {SEED})")
    cli(main, p)
