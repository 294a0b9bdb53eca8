const list = document.getElementById("cases"), find = document.getElementById("find");
const open = () => { if (location.hash) { list.open = true; document.getElementById(location.hash.slice(1))?.scrollIntoView({ block: "center" }); } };
addEventListener("hashchange", open);
open();
find.addEventListener("input", () => {
  const words = find.value.toLowerCase().split(/\s+/);
  for (const row of list.querySelectorAll("tbody tr")) row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word));
});
