// Package page_test looks at the status page of a real daemon in a real browser, over a forwarded port as an operator does.
package page_test

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"io"
	"maps"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/page"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

var update = flag.Bool("update", false, "write the pictures of the docs")

var shared *lab.Lab

func TestMain(m *testing.M) { os.Exit(labtest.Main(m, func(l *lab.Lab) { shared = l })) }

const (
	roleAnnotation = "eks.amazonaws.com/role-arn"
	allowed        = "iam.amazonaws.com/allowed-roles"
	roles          = "arn:aws:iam::" + lab.Account + ":role/"
	hostile        = `arn:aws:iam::<script>document.title="owned"</script><img src=x onerror=alert(1)>:role/"'><b>`
)

// forward is a listener on loopback that leads to the node's own, as kubectl port-forward does.
func forward(t *testing.T, n *lab.Node) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var open sync.WaitGroup
	t.Cleanup(func() { l.Close(); open.Wait() })
	open.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			open.Go(func() {
				defer c.Close()
				up, err := n.Net.Dial(t.Context(), "tcp", "127.0.0.1:9182")
				if err != nil {
					return
				}
				defer up.Close()
				defer context.AfterFunc(t.Context(), func() { c.Close(); up.Close() })()
				go func() { _, _ = io.Copy(up, c); up.(*net.TCPConn).CloseWrite() }()
				_, _ = io.Copy(c, up)
			})
		}
	})
	return "http://" + l.Addr().String()
}

// browser is one tab that notes what the page asks for and complains of.
type browser struct {
	context.Context
	mu       sync.Mutex
	requests []string
	noise    []string // console, log and exceptions
}

func open(t *testing.T) *browser {
	t.Helper()
	if _, err := exec.LookPath("chromium"); err != nil {
		t.Fatalf("%v: apt-get install -y --no-install-recommends chromium fonts-dejavu-core (e2e/page/install.sh)", err)
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:],
		chromedp.ExecPath("chromium"), chromedp.NoSandbox, chromedp.DisableGPU, chromedp.UserDataDir(t.TempDir()),
		chromedp.Flag("disable-background-networking", true), chromedp.Flag("disable-component-update", true), chromedp.Flag("disable-sync", true),
		chromedp.Flag("disable-quic", true), chromedp.Flag("no-first-run", true), chromedp.Flag("no-proxy-server", true),
		// Nothing but the forwarded port: the machine's network may have a metadata endpoint.
		chromedp.Flag("host-resolver-rules", "MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"),
	)
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Minute)
	ctx, stop := chromedp.NewExecAllocator(ctx, options...)
	ctx, end := chromedp.NewContext(ctx)
	t.Cleanup(func() { end(); stop(); cancel() })
	b := &browser{Context: ctx}
	if err := chromedp.Listen(ctx, func(event any) {
		b.mu.Lock()
		defer b.mu.Unlock()
		switch e := event.(type) {
		case *network.EventRequestWillBeSent:
			b.requests = append(b.requests, e.Request.URL)
		case *log.EventEntryAdded:
			b.noise = append(b.noise, fmt.Sprintf("%s: %s", e.Entry.Source, e.Entry.Text))
		case *runtime.EventConsoleAPICalled:
			b.noise = append(b.noise, fmt.Sprintf("console: %v", e.Args))
		case *runtime.EventExceptionThrown:
			b.noise = append(b.noise, "exception: "+e.ExceptionDetails.Text)
		case *page.EventJavascriptDialogOpening:
			b.noise = append(b.noise, "dialog: "+e.Message)
		}
	}); err != nil {
		t.Fatal(err)
	}
	send(t, b, network.Enable, network.EnableParams{})
	send(t, b, log.Enable, cdp.Empty{})
	send(t, b, runtime.Enable, cdp.Empty{})
	send(t, b, page.Enable, page.EnableParams{})
	return b
}

// send sends a command of the protocol.
func send[P, R any](t *testing.T, b *browser, command cdp.Command[P, R], params P) {
	t.Helper()
	if _, err := chromedp.Call(b.Context, command, params); err != nil {
		t.Fatal(err)
	}
}

func (b *browser) run(t *testing.T, actions ...chromedp.Action[chromedp.Void]) {
	t.Helper()
	if err := chromedp.Do(b.Context, actions...); err != nil {
		t.Fatal(err)
	}
}

// value is what an action returns.
func value[T any](t *testing.T, b *browser, action chromedp.Action[T]) T {
	t.Helper()
	v, err := chromedp.Run(b.Context, action)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// eval is the value of an expression in the page.
func eval[T any](t *testing.T, b *browser, expression string) T {
	t.Helper()
	return value(t, b, chromedp.Evaluate[T](expression))
}

// view makes the window's size and colours.
func (b *browser) view(t *testing.T, width, height int64, scheme string) {
	t.Helper()
	send(t, b, emulation.SetDeviceMetricsOverride, emulation.SetDeviceMetricsOverrideParams{
		Width: width, Height: height, DeviceScaleFactor: 1, Mobile: width < 600,
	})
	send(t, b, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}},
	})
}

// clean fails the test unless the page asked for nothing but itself and complained of nothing.
func (b *browser) clean(t *testing.T, base string) {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, url := range b.requests {
		if !strings.HasPrefix(url, base+"/") && !strings.HasPrefix(url, "data:") {
			t.Errorf("the page asked for %s", url)
		}
	}
	if len(b.requests) == 0 {
		t.Error("no request was seen: the browser is not watched")
	}
	for _, n := range b.noise {
		t.Errorf("the browser says: %s", n)
	}
}

// fits fails the test if something is wider than the window.
func fits(t *testing.T, b *browser, what string) {
	t.Helper()
	wide := eval[[]string](t, b, `[...document.querySelectorAll('body *')].filter(e => {
		const r = e.getBoundingClientRect(); return r.width > 0 && getComputedStyle(e).clipPath === 'none' && r.right > innerWidth + 1 && !e.closest('thead')
	}).map(e => e.tagName + '.' + e.className + ' ' + e.textContent.trim().slice(0, 40)).slice(0, 5)`)
	scroll := eval[[]int](t, b, `[document.documentElement.scrollWidth, innerWidth]`)
	if len(wide) > 0 || scroll[0] > scroll[1] {
		t.Errorf("%s: the page is %d wide in a window of %d: %q", what, scroll[0], scroll[1], wide)
	}
}

// picture writes the whole page to e2e/out.
func picture(t *testing.T, b *browser, name string) {
	t.Helper()
	writePicture(t, filepath.Join("..", "out", "page-"+name+".png"), value(t, b, chromedp.FullScreenshot(100)))
}

// document writes the picture of the docs: what one sees first.
func document(t *testing.T, b *browser, name string) {
	t.Helper()
	shot, err := png.Decode(bytes.NewReader(value(t, b, chromedp.CaptureScreenshot())))
	if err != nil {
		t.Fatal(err)
	}
	var small bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&small, paletted(shot)); err != nil {
		t.Fatal(err)
	}
	if small.Len() > 150<<10 {
		t.Errorf("%s has %d bytes: too large for the docs", name, small.Len())
	}
	if *update {
		writePicture(t, filepath.Join("..", "..", "docs", name), small.Bytes())
	}
}

// paletted is a picture in its 256 most frequent colours: all that a page of text needs, in a third of the bytes.
func paletted(m image.Image) image.Image {
	count := map[color.RGBA]int{}
	size := m.Bounds()
	for y := size.Min.Y; y < size.Max.Y; y++ {
		for x := size.Min.X; x < size.Max.X; x++ {
			count[color.RGBAModel.Convert(m.At(x, y)).(color.RGBA)]++
		}
	}
	var palette color.Palette
	for _, c := range slices.SortedFunc(maps.Keys(count), func(a, b color.RGBA) int {
		return cmp.Or(count[b]-count[a], int(a.R)-int(b.R), int(a.G)-int(b.G), int(a.B)-int(b.B))
	}) {
		if len(palette) < 256 {
			palette = append(palette, c)
		}
	}
	p := image.NewPaletted(size, palette)
	draw.Draw(p, size, m, size.Min, draw.Src)
	return p
}

func writePicture(t *testing.T, path string, png []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, png, 0o644); err != nil {
		t.Fatal(err)
	}
}

// setUp is a node with pods in every state, and its daemon.
func setUp(t *testing.T) (n *lab.Node, d *lab.Daemon, base string) {
	t.Helper()
	ctx := labtest.Context(t)
	n = labtest.Node(t, shared, lab.NodeOptions{})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	account := func(namespace, name, role string) {
		t.Helper()
		must(shared.ServiceAccount(ctx, namespace, name, map[string]string{roleAnnotation: role}))
	}
	for _, name := range []string{"cart", "team/billing", "search"} {
		_, err := n.Role(name, aws.ActionListBuckets)
		must(err)
	}
	must(n.AWS.SetRole(aws.Role{ARN: roles + "reports"})) // trusts nobody
	must(shared.Namespace(ctx, "shop", map[string]string{allowed: `["` + roles + `*"]`}))
	must(shared.Namespace(ctx, "data", map[string]string{allowed: `["` + roles + `etl-*"]`}))
	account("shop", "cart", roles+"cart")
	account("shop", "billing", roles+"team/billing")
	account("shop", "search", roles+"search")
	account("shop", "reports", roles+"reports")
	account("shop", "mail", "arn:aws:iam::"+lab.Account+":user/mail")
	account("data", "etl", roles+"warehouse")
	account("data", "hostile", hostile)
	pod := func(namespace, name, account string, more func(*lab.PodSpec)) *lab.Pod {
		s := lab.PodSpec{Namespace: namespace, Name: name, ServiceAccount: account}
		if more != nil {
			more(&s)
		}
		return labtest.Pod(t, n, s)
	}
	asking := []*lab.Pod{
		pod("shop", "cart-7d9f6c5b8d-4xkqz", "cart", nil),
		pod("shop", "billing-5c6f7d8b9-m2x7p", "billing", nil),
		pod("shop", "reports-6b8c9d7f5-q9w4t", "reports", nil),
		pod("shop", "mail-0", "mail", nil),
		pod("data", "etl-28471230-lm4vz", "etl", nil),
		pod("data", "hostile-0", "hostile", nil),
		pod("shop", "frontend-66d8b7f9c-x8zrt", "frontend", nil),
	}
	pod("shop", "search-0", "search", nil)
	pod("shop", "search-1", "search", func(s *lab.PodSpec) { s.Env = map[string]string{"AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token"} })
	pod("kube-system", "node-exporter-t5k2w", "node-exporter", func(s *lab.PodSpec) { s.HostNetwork = true })
	twin := pod("data", "twin-a", "default", nil)
	pod("data", "twin-b", "default", func(s *lab.PodSpec) { s.IP, s.Detached = twin.IPs[0], true })
	d = labtest.Daemon(t, n, "-cluster-name", "lab", "-session-tags")
	for _, p := range asking {
		for _, path := range []string{"/latest/meta-data/iam/security-credentials/", "/latest/user-data"} {
			status := 0
			for ctx.Err() == nil && (status == 0 || status == http.StatusServiceUnavailable) {
				req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://169.254.169.254"+path, nil)
				must(err)
				resp, err := p.HTTP().Do(req)
				must(err)
				resp.Body.Close()
				status = resp.StatusCode
			}
		}
	}
	return n, d, forward(t, n)
}

// TestPage is everything on one node: it costs a browser and a daemon, so the parts share them.
func TestPage(t *testing.T) {
	n, d, base := setUp(t)
	b := open(t)

	for _, v := range []struct {
		name, scheme, doc string
		width, height     int64
	}{
		{"desktop-light", "light", "page-desktop.png", 1280, 900}, {"desktop-dark", "dark", "", 1280, 800},
		{"phone-light", "light", "", 390, 844}, {"phone-dark", "dark", "page-phone.png", 390, 844},
	} {
		b.view(t, v.width, v.height, v.scheme)
		b.run(t, chromedp.Navigate(base+"/"), chromedp.WaitVisible(chromedp.CSS("table.pods")))
		fits(t, b, v.name)
		dark := eval[bool](t, b, `getComputedStyle(document.body).backgroundColor.match(/\d+/g).every(c => c < 64)`)
		if dark != (v.scheme == "dark") {
			t.Errorf("%s: dark is %v", v.name, dark)
		}
		for what, small := range map[string]string{
			"text": `[...document.querySelectorAll('body *')].filter(e => e.children.length === 0 && e.textContent.trim() && parseFloat(getComputedStyle(e).fontSize) < 11).length`,
			// A column of two letters a line is no table.
			"column": `[...document.querySelectorAll('.pods td')].filter(e => e.textContent.trim() && getComputedStyle(e).display !== 'none' && e.getBoundingClientRect().width < 60).length`,
		} {
			if bad := eval[int](t, b, small); bad != 0 {
				t.Errorf("%s: %d pieces of %s are too small", v.name, bad, what)
			}
		}
		if v.doc != "" {
			document(t, b, v.doc)
		}
		picture(t, b, v.name)
		eval[chromedp.Void](t, b, `document.querySelectorAll('details').forEach(d => d.open = true)`)
		fits(t, b, v.name+", unfolded")
		picture(t, b, v.name+"-unfolded")
	}

	t.Run("what it says", func(t *testing.T) {
		text := eval[string](t, b, `document.body.textContent`)
		for _, want := range []string{
			"Ready", "6 pods need attention", "cart-7d9f6c5b8d-4xkqz", roles + "team/billing", "by api",
			"namespace data does not permit role " + roles + "warehouse",
			`kubectl annotate namespace data iam.amazonaws.com/allowed-roles='["` + roles + `etl-*","` + roles + `warehouse"]' --overwrite`,
			"AccessDenied", `{"Effect":"Allow","Principal":{"AWS":"` + lab.NodeRoleARN + `"},"Action":["sts:AssumeRole","sts:TagSession"]}`,
			"it names a thing of the kind user, not a role", "service account shop/frontend has no " + roleAnnotation, "hostNetwork",
			"another source of credentials", "more than one running pod has this IP: data/twin-a, data/twin-b", "/latest/user-data",
			"-session-tags", "guard ipv4", "redirect ipv4",
		} {
			if !strings.Contains(text, want) {
				t.Errorf("the page does not say %q", want)
			}
		}
		if !strings.Contains(text, `<script>document.title=\"owned\"`) {
			t.Error("the hostile annotation is not shown as it was written")
		}
		if got := eval[[]int](t, b, `[document.scripts.length, document.images.length, document.querySelectorAll('[onerror],[style]').length]`); got[0]+got[1]+got[2] != 0 {
			t.Errorf("scripts, images and handlers in the page: %v", got)
		}
		if title := eval[string](t, b, `document.title`); title != "(6) "+n.Name+" · imdsgate" {
			t.Errorf("title %q", title)
		}
		// First what somebody should look at.
		states := eval[[]string](t, b, `[...document.querySelectorAll('.state')].map(e => e.textContent)`)
		if len(states) != 13 || states[0] != "failing" || states[1] != "refused" || states[6] != "served" {
			t.Errorf("states %q", states)
		}
	})
	t.Run("filter", func(t *testing.T) {
		b.run(t, chromedp.SetValue(chromedp.CSS(`input[name=q]`), "shop SEARCH"), chromedp.Submit(chromedp.CSS(`input[name=q]`)), chromedp.WaitReady(chromedp.CSS("footer")))
		if got := eval[[]string](t, b, `[...document.querySelectorAll('.pods tbody tr:not(.why) td:first-child b')].map(e => e.textContent)`); fmt.Sprint(got) != "[search-0 search-1]" {
			t.Errorf("shop SEARCH finds %q at %s", got, eval[string](t, b, `location.href`))
		}
		b.run(t, chromedp.Navigate(base+"/?q=data"), chromedp.Click(chromedp.CSS(`.tab-attention`)), chromedp.WaitReady(chromedp.CSS(`.tab-attention[aria-current]`)))
		if got := eval[int](t, b, `document.querySelectorAll('.pods tbody tr:not(.why)').length`); got != 4 {
			t.Errorf("%d pods of namespace data need attention", got)
		}
		if q := eval[string](t, b, `document.querySelector('input[name=q]').value`); q != "data" {
			t.Errorf("the filter is %q then", q)
		}
		b.run(t, chromedp.Navigate(base+"/?q=%22%3E%3Cscript%3Ealert(1)%3C/script%3E"), chromedp.WaitVisible(chromedp.CSS(".empty")))
		if eval[int](t, b, `document.scripts.length`) != 0 {
			t.Error("the filter became a script")
		}
	})
	t.Run("refresh", func(t *testing.T) {
		b.run(t, chromedp.Navigate(base+"/?q=cart&refresh=1"), chromedp.WaitReady(chromedp.CSS("footer")))
		loaded := eval[float64](t, b, `performance.timeOrigin`)
		for again := loaded; again == loaded; {
			time.Sleep(100 * time.Millisecond)                                                        // the page's own interval is two seconds
			now, err := chromedp.Run(b.Context, chromedp.Evaluate[float64](`performance.timeOrigin`)) // fails while it is replaced
			if b.Err() != nil {
				t.Fatal("the page never came again")
			}
			if err == nil {
				again = now
			}
		}
		if q := eval[string](t, b, `document.querySelector('input[name=q]').value`); q != "cart" {
			t.Errorf("the filter is %q after the refresh", q)
		}
		b.run(t, chromedp.Navigate(base+"/"))
	})
	t.Run("a full node", func(t *testing.T) {
		ctx := labtest.Context(t)
		if err := shared.Namespace(ctx, "fleet", map[string]string{allowed: `["` + roles + `*"]`}); err != nil {
			t.Fatal(err)
		}
		if err := shared.ServiceAccount(ctx, "fleet", "worker", map[string]string{roleAnnotation: roles + "cart"}); err != nil {
			t.Fatal(err)
		}
		for i := range 230 {
			labtest.Pod(t, n, lab.PodSpec{Namespace: "fleet", Name: fmt.Sprintf("worker-%03d", i), ServiceAccount: "worker", Detached: true})
		}
		var listed int
		for ctx.Err() == nil && listed < 243 {
			b.view(t, 390, 844, "light")
			b.run(t, chromedp.Navigate(base+"/"), chromedp.WaitVisible(chromedp.CSS("table.pods")))
			listed = eval[int](t, b, `document.querySelectorAll('.pods tbody tr:not(.why)').length`)
		}
		if listed != 243 {
			t.Errorf("%d pods are listed", listed)
		}
		fits(t, b, "a full node on a phone")
		if first := eval[string](t, b, `document.querySelector('.state').textContent`); first != "failing" {
			t.Errorf("first comes what is %s", first)
		}
		picture(t, b, "full")
		start := time.Now()
		body, err := d.Debug(ctx, "/")
		if err != nil || len(body) > 2<<20 || time.Since(start) > 2*time.Second {
			t.Errorf("%d bytes in %s: %v", len(body), time.Since(start), err)
		}
		t.Logf("%d pods: %d bytes of HTML", listed, len(body))
	})
	b.clean(t, base)
}

// TestDebugListener: names that a foreign page may have are refused, secrets are not told, and the JSON is what it was.
func TestDebugListener(t *testing.T) {
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{})
	role, err := n.Role("json")
	if err != nil {
		t.Fatal(err)
	}
	namespace := shared.Unique("json")
	if err := shared.Namespace(ctx, namespace, map[string]string{allowed: `["` + role + `"]`}); err != nil {
		t.Fatal(err)
	}
	if err := shared.ServiceAccount(ctx, namespace, "app", map[string]string{roleAnnotation: role, "imdsgate.dev/external-id": "hush-hush"}); err != nil {
		t.Fatal(err)
	}
	p := labtest.Pod(t, n, lab.PodSpec{Namespace: namespace, ServiceAccount: "app"})
	d := labtest.Daemon(t, n)
	base := forward(t, n)
	ask := func(path, host string) (*http.Response, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, base+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		req.Host = host
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		if err != nil {
			t.Fatal(err)
		}
		return resp, string(body)
	}
	for host, want := range map[string]int{
		"localhost": 200, "localhost:9182": 200, "127.0.0.1:1": 200, "[::1]:9182": 200,
		"evil.example": 403, "evil.example:9182": 403, "localhost.evil.example": 403, "127.0.0.1.evil.example": 403, "169-254-169-254.nip.io": 403,
	} {
		for _, path := range []string{"/", "/debug/pods", "/debug/status"} {
			if resp, body := ask(path, host); resp.StatusCode != want || want == 403 && strings.Contains(body, p.Name) {
				t.Errorf("%s for %s is %d", path, host, resp.StatusCode)
			}
		}
	}
	type pod struct {
		Namespace, Name, UID, Decision, Status, Source string
		ServiceAccount                                 string       `json:"service_account"`
		RoleARN                                        string       `json:"role_arn"`
		SessionName                                    string       `json:"session_name"`
		IPs                                            []netip.Addr `json:"ips"`
		Prefetch                                       bool
		Steps                                          []string
		Credentials                                    *struct {
			State           string
			Issued, Expires time.Time
			NextRefresh     time.Time `json:"next_refresh"`
		}
	}
	var got pod
	for got.Credentials == nil || got.Credentials.State == "pending" {
		if ctx.Err() != nil {
			t.Fatalf("never with credentials: %+v", got)
		}
		var all []pod
		if _, body := ask("/debug/pods", ""); json.Unmarshal([]byte(body), &all) != nil {
			t.Fatal("/debug/pods is no list")
		}
		for _, one := range all {
			if one.Name == p.Name {
				got = one
			}
		}
	}
	c := got.Credentials
	if got.RoleARN != role || got.Decision != "granted" || got.Status != "served" || got.Source != "api" || !got.Prefetch || len(got.IPs) != 2 || len(got.Steps) < 5 || got.UID != string(p.UID) {
		t.Errorf("/debug/pods says %+v", got)
	}
	if c.State != "ready" || c.Expires.Sub(c.Issued).Round(time.Minute) != time.Hour || !c.NextRefresh.After(c.Issued) || !c.NextRefresh.Before(c.Expires) {
		t.Errorf("credentials %+v", c)
	}
	var status struct {
		Node, Version, Issuer string
		Flags                 []struct{ Name, Value string }
		Rules                 []struct{ Severity, About, Text string }
	}
	resp, body := ask("/debug/status", "")
	if err := json.Unmarshal([]byte(body), &status); err != nil || status.Node != n.Name || len(status.Flags) < 20 || len(status.Rules) < 2 {
		t.Errorf("/debug/status: %v: %+v", err, status)
	}
	_, html := ask("/", "")
	issued := n.AWS.Calls()
	for _, text := range []string{body, html, d.Log().String()} {
		for _, secret := range []string{"hush-hush", "SecretAccessKey", "AQoD"} {
			if strings.Contains(text, secret) {
				t.Errorf("%q is told", secret)
			}
		}
		for _, call := range issued {
			if call.Issued != "" && text != d.Log().String() && strings.Contains(text, call.Issued) {
				t.Errorf("the access key ID %s is told", call.Issued)
			}
		}
	}
	for name, want := range map[string]string{
		"Content-Security-Policy": "default-src 'none'; style-src 'sha256-", "X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Referrer-Policy": "no-referrer",
	} {
		if !strings.HasPrefix(resp.Header.Get(name), want) {
			t.Errorf("%s: %q", name, resp.Header.Get(name))
		}
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		t.Error("too slow")
	}
}
