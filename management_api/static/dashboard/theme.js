// Before the first paint: light or dark as chosen here, else as the system has it. Nothing but that is kept.
"use strict";

const chosen = localStorage.getItem("theme");
if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
