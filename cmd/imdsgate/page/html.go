package page

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"

	g "maragu.dev/gomponents"
	"maragu.dev/gomponents/html"

	"github.com/imdsgate/imdsgate/proxy"
	"github.com/imdsgate/imdsgate/proxy/pods"
)

func (s *shown) html() g.Node {
	return html.Doctype(html.HTML(html.Lang("en"),
		html.Head(
			html.Meta(html.Charset("utf-8")),
			html.Meta(html.Name("viewport"), html.Content("width=device-width, initial-scale=1")),
			html.Meta(html.Name("color-scheme"), html.Content("light dark")),
			g.If(s.Refresh > 0, html.Meta(g.Attr("http-equiv", "refresh"), html.Content(strconv.Itoa(s.Refresh)))),
			html.TitleEl(g.If(s.Attention > 0, g.Textf("(%d) ", s.Attention)), g.Text(s.Node+" · imdsgate")),
			html.Link(html.Rel("icon"), html.Href("data:,")),
			html.StyleEl(g.Raw(style)),
		),
		html.Body(s.header(), html.Main(s.pods(), s.denials(), s.rules(), s.flags()), s.footer()),
	))
}

func (s *shown) header() g.Node {
	return html.Header(
		html.Div(html.Class("bar"),
			html.H1(g.Text("imdsgate "), html.Span(html.Class("node"), g.Text(s.Node))),
			html.P(html.Class("meta"), g.Textf("%s · %s · up %s", s.Version, s.Issuer, s.ago(s.Started))),
		),
		s.readiness(),
		g.Map(s.Troubles, func(text string) g.Node { return html.P(html.Class("banner bad"), g.Text(text)) }),
		g.Map(s.Bad, func(f Finding) g.Node {
			class := "banner warn"
			if f.Severity == "error" {
				class = "banner bad"
			}
			return html.Div(html.Class(class), html.Strong(g.Text(f.About+":")), g.Text(" "+f.Text),
				g.If(f.Fix != "", g.Group{html.Br(), hint(), g.Text(" " + f.Fix)}))
		}),
	)
}

func (s *shown) readiness() g.Node {
	switch {
	case len(s.NotReady) > 0:
		return html.Div(html.Class("banner bad"), html.Role("status"), html.Strong(g.Text("Not ready")),
			html.Ul(g.Map(s.NotReady, func(what string) g.Node { return html.Li(g.Text(what)) })))
	case s.Attention > 0:
		need := "pods need"
		if s.Attention == 1 {
			need = "pod needs"
		}
		return html.P(html.Class("banner warn"), html.Role("status"), html.Strong(g.Text("Ready")), g.Textf(", but %d %s attention.", s.Attention, need))
	}
	return html.P(html.Class("banner good"), html.Role("status"), html.Strong(g.Text("Ready.")), g.Text(" No pod needs attention."))
}

func (s *shown) pods() g.Node {
	return html.Section(html.Aria("labelledby", "pods"),
		html.Div(html.Class("tools"), html.H2(html.ID("pods"), g.Text("Pods")), s.form()),
		html.Nav(html.Aria("label", "which pods"), g.Map(s.Tabs, func(t tab) g.Node {
			return html.A(html.Href(t.Link), g.If(t.Current, html.Aria("current", "page")), html.Class("tab-"+t.Show), g.Text(t.Name+" "), bold(strconv.Itoa(t.Count)))
		})),
		g.If(len(s.Listed) > 0, html.Table(html.Class("pods"), head("Pod", "Role", "Credentials", "State"), html.TBody(g.Map(s.Listed, s.pod)))),
		g.If(len(s.Listed) == 0 && len(s.Pods) > 0, empty(g.Text("No pod matches. "), html.A(html.Href("/"), g.Text("Show all")))),
		g.If(len(s.Pods) == 0, empty(g.Text("No pod is bound to this node, as far as is known."))),
	)
}

func (s *shown) form() g.Node {
	intervals := []int{0, 5, 30}
	if s.Refresh != 0 && s.Refresh != 5 && s.Refresh != 30 {
		intervals = append(intervals, s.Refresh)
	}
	return html.Form(html.Method("get"), html.Action("/"),
		html.Input(html.Type("search"), html.Name("q"), html.Value(s.Query), html.Placeholder("pod, account, role, IP"), html.Aria("label", "filter"), html.MaxLength(strconv.Itoa(maxQuery))),
		g.If(s.Show != "all", html.Input(html.Type("hidden"), html.Name("show"), html.Value(s.Show))),
		html.Select(html.Name("refresh"), html.Aria("label", "refresh"), g.Map(intervals, func(seconds int) g.Node {
			label := "no refresh"
			if seconds > 0 {
				label = fmt.Sprintf("every %d s", seconds)
			}
			return html.Option(html.Value(strconv.Itoa(seconds)), g.If(seconds == s.Refresh, html.Selected()), g.Text(label))
		})),
		html.Button(g.Text("Show")),
	)
}

// pod is its line in the table, and one below it that says why.
func (s *shown) pod(p Pod) g.Node {
	state := "off"
	switch {
	case p.Status.Attention():
		state = "bad"
	case p.Status == Served:
		state = "good"
	case p.Status == Waiting:
		state = "wait"
	}
	rows, why := "", "why"
	if p.Status.Attention() {
		rows, why = "attention", "why attention"
	}
	owner := p.Namespace
	if p.ServiceAccount != "" {
		owner += " · account " + p.ServiceAccount
	}
	role := g.Group{html.Class("void"), none("none")}
	if p.RoleARN != "" {
		role = g.Group{bold(lastSegment(p.RoleARN)), g.Text(" "), html.Small(html.Class("arn"), g.Text(p.RoleARN))}
	}
	return g.Group{
		html.Tr(html.Class(rows),
			cell("Pod", bold(p.Name), small(owner), g.If(len(p.IPs) > 0, html.Small(html.Class("ip"), g.Text(p.where())))),
			cell("Role", role),
			cell("Credentials", s.credentials(p.Credentials)),
			cell("State", html.Span(html.Class("state s-"+state), g.Text(string(p.Status)))),
		),
		html.Tr(html.Class(why), html.Td(html.ColSpan("4"),
			g.If(p.Problem != "", g.Group{
				html.P(html.Class("problem"), g.Text(p.Problem)),
				g.If(p.Fix != "", html.P(html.Class("fix"), hint(), html.Code(g.Text(p.Fix)))),
			}),
			html.Details(html.Summary(g.Text("step by step")), html.Ol(g.Map(p.Steps, func(step pods.Step) g.Node {
				mark := "note"
				switch step.Mark {
				case pods.OK:
					mark = "ok"
				case pods.Bad:
					mark = "bad"
				}
				said := p.Problem != "" && step.Fix == p.Fix
				return html.Li(html.Class("m-"+mark), bold(step.About), g.Text(" "), html.Span(g.Text(step.Text),
					g.If(step.Fix != "" && !said, g.Group{g.Text(" "), hint(), g.Text(" "), html.Code(g.Text(step.Fix))})))
			}))),
		)),
	}
}

// where is the pod's addresses, and what told of them.
func (p *Pod) where() string {
	var ips []string
	for _, ip := range p.IPs {
		ips = append(ips, ip.String())
	}
	text := strings.Join(ips, ", ")
	if p.Source != "" {
		text += " by " + p.Source
	}
	return text
}

func (s *shown) credentials(c *Credentials) g.Node {
	switch {
	case c == nil:
		return g.Group{html.Class("void"), none("–")}
	case c.Issued.IsZero():
		return g.Group{none("none"), g.If(!c.NextRefresh.IsZero(), small("next try in "+s.in(c.NextRefresh)))}
	}
	age := s.ago(c.Issued) + " old"
	if !c.NextRefresh.IsZero() {
		age += " · next in " + s.in(c.NextRefresh)
	}
	return g.Group{
		html.Span(html.Class("left"), g.Text(s.in(c.Expires)+" left")), g.Text(" "),
		html.Progress(html.Max("100"), html.Value(strconv.Itoa(s.share(c))), html.Aria("label", "of their life is over")), small(age),
	}
}

func (s *shown) denials() g.Node {
	return html.Section(html.Aria("labelledby", "denied"),
		html.H2(html.ID("denied"), g.Text("Refused lately")),
		g.If(len(s.Denials) == 0, empty(g.Text("No request was refused since the start."))),
		g.If(len(s.Denials) > 0, html.Table(html.Class("denials"), head("Who", "Asked for", "Was told", "Last"),
			html.TBody(g.Map(s.Denials, func(d proxy.Denial) g.Node {
				who, source := s.who(d), ""
				if who == "" {
					who = "unknown"
				}
				if d.Source != (netip.Addr{}) {
					source = d.Source.String()
				}
				return html.Tr(
					cell("Who", bold(who), small(source)),
					cell("Asked for", html.Code(g.Text(d.Path))),
					cell("Was told", html.Span(html.Class("told"), html.Title(d.Text), bold(strconv.Itoa(d.Code)), g.Text(" "+d.Text))),
					cell("Last", html.Class("num"), g.Text(s.ago(d.Last)+" ago"), g.If(d.Count > 1, small(fmt.Sprintf("×%d", d.Count)))),
				)
			})),
		)),
	)
}

func (s *shown) rules() g.Node {
	return html.Section(html.Aria("labelledby", "rules"),
		html.H2(html.ID("rules"), g.Text("Redirect and guard")),
		g.If(len(s.Rules) == 0, empty(g.Text("Both are switched off: -redirect=none, -guard=false."))),
		g.If(len(s.Rules) > 0, html.Ul(html.Class("rules"), g.Map(s.Rules, func(f Finding) g.Node {
			return html.Li(html.Class(f.Severity), bold(f.About), g.Text(" "),
				html.Span(g.Text(f.Text), g.If(f.Fix != "", g.Group{g.Text(" "), hint(), g.Text(" " + f.Fix)})))
		}))),
	)
}

// flags are those that somebody set, and the others behind a click.
func (s *shown) flags() g.Node {
	var set, defaults []Flag
	for _, f := range s.Flags {
		if f.Default {
			defaults = append(defaults, f)
		} else {
			set = append(set, f)
		}
	}
	list := func(flags []Flag) g.Node {
		return html.Dl(html.Class("flags"), g.Map(flags, func(f Flag) g.Node {
			value := g.Text(f.Value)
			if f.Value == "" {
				value = html.I(g.Text("empty"))
			}
			return html.Div(html.Dt(g.Text("-"+f.Name)), html.Dd(value))
		}))
	}
	return html.Section(html.Aria("labelledby", "flags"),
		html.H2(html.ID("flags"), g.Text("Flags in effect")),
		list(set),
		html.Details(html.Summary(g.Textf("%d at their defaults", len(defaults))), list(defaults)),
	)
}

func (s *shown) footer() g.Node {
	return html.Footer(html.P(
		g.Text("As of "+s.Now.UTC().Format(time.DateTime)+" UTC · "), html.A(html.Href("/debug/status"), g.Text("JSON")),
		g.Text(" · "), html.A(html.Href("/debug/pods"), g.Text("pods as JSON")),
		g.Text(" · "), html.Code(g.Text("imdsgate -check NAMESPACE/POD")), g.Text(" tells the same in a shell"),
	))
}

func head(columns ...string) g.Node {
	return html.THead(html.Tr(g.Map(columns, func(name string) g.Node { return html.Th(g.Text(name)) })))
}

// cell is one of a table that is a list on a phone, where label stands before it.
func cell(label string, content ...g.Node) g.Node {
	return html.Td(html.Data("label", label), g.Group(content))
}

func empty(content ...g.Node) g.Node { return html.P(html.Class("empty"), g.Group(content)) }
func bold(text string) g.Node        { return html.B(g.Text(text)) }
func none(text string) g.Node        { return html.Span(html.Class("none"), g.Text(text)) }
func hint() g.Node                   { return html.Span(html.Class("hint"), g.Text("fix")) }

// small stands behind something else.
func small(text string) g.Node { return g.Group{g.Text(" "), html.Small(g.Text(text))} }
