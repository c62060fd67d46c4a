"""Generated invoices and receipts in five languages, with their gold: the corpus that comes with the project."""

import random
import re
from datetime import date, timedelta

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
