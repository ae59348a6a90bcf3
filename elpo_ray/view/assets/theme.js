// Dark and light: the user's choice, otherwise the system's.

const dark = () => document.documentElement.dataset.theme === "dark";

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
}

function startTheme() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  setTheme(memory.get("theme") ?? system);
}

function switchTheme() {
  const theme = dark() ? "light" : "dark";
  memory.set("theme", theme);
  setTheme(theme);
}
