package e2e_test

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	rbacv1 "k8s.io/api/rbac/v1"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

// conformanceTable is the table of the proxy's own tests, which explains its fields.
const conformanceTable = "../proxy/testdata/conformance.json"

// The table's real endpoint is in another region, and its refused pod in another namespace.
var inTheLab = strings.NewReplacer("eu-test-1", lab.Region, "namespace shop", "namespace closed-")

type conformance struct{ Rows []conformanceRow }

type conformanceRow struct {
	ID, About, Pod, Setting, Request, Then string
	Answers                                []struct {
		Status  []int
		Headers map[string]string
		Absent  []string
		Body    string
	}
	WithinMS              int `json:"within_ms"`
	Credentials, Upstream bool
}

// conforming is a node with every kind of pod that the table knows.
type conforming struct {
	node    *lab.Node
	pods    map[string]*lab.Pod
	roles   map[string]string // ARN by pod
	expired string            // a session token of the pod role
}

// Every row of the conformance table, asked by real pods over the real redirect.
func TestLabConformance(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile(conformanceTable)
	if err != nil {
		t.Fatal(err)
	}
	var table conformance
	if err := json.Unmarshal(data, &table); err != nil {
		t.Fatal(err)
	}
	nodes := map[string]*conforming{
		"":              newConforming(t),
		"v2-only":       newConforming(t, "-imdsv1=false"),
		"upstream-down": newConforming(t),
	}
	if _, err := nodes["upstream-down"].node.Run(t.Context(), "ip", "route", "add", "unreachable", "169.254.169.254"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(1100 * time.Millisecond) // the expired tokens live for a second
	for _, row := range table.Rows {
		t.Run(row.ID, func(t *testing.T) {
			c := nodes[row.Setting]
			if row.Pod == "" {
				row.Pod = "role"
			}
			if c == nil || c.pods[row.Pod] == nil {
				t.Fatalf("the lab has no setting %q with a pod %q", row.Setting, row.Pod)
			}
			// Other tests run on the same processors, some of the time; what is held is held every time.
			for attempt := 1; c.try(t, row); attempt++ {
				if attempt == 3 {
					t.Errorf("answered late %d times", attempt)
					break
				}
			}
		})
	}
	t.Logf("%d rows", len(table.Rows))
	for setting, c := range nodes {
		if err := c.node.Untouched(labtest.Context(t), expectedOfNodeRole); err != nil {
			t.Errorf("setting %q: %v", setting, err)
		}
	}
}

// try sends a row's request and checks the answers. It reports whether they came late.
func (c *conforming) try(t *testing.T, row conformanceRow) (late bool) {
	t.Helper()
	fill := c.placeholders(t, row.Pod, row.Request)
	upstream := len(shared.IMDS.Requests(c.node.Addrs()...))
	conn, err := c.pods[row.Pod].Dial(labtest.Context(t), "tcp", "169.254.169.254:80")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	request := latin1(fill(row.Request))
	start := time.Now()
	if err := conn.SetDeadline(start.Add(10 * time.Second)); err != nil {
		t.Fatal(err)
	}
	go io.WriteString(conn, request) // may be answered and closed before all of it is read
	replies := bufio.NewReader(conn)
	method, _, _ := strings.Cut(request, " ")
	within := 250 * time.Millisecond
	if row.WithinMS > 0 {
		within = time.Duration(row.WithinMS) * time.Millisecond
	}
	within += 250 * time.Millisecond // other tests run on the same processors
	for i, want := range row.Answers {
		resp, body, err := readReply(replies, method)
		if err != nil {
			t.Fatalf("%s: answer %d: %v", row.About, i+1, err)
		}
		late = late || time.Since(start) > within
		if !slices.Contains(want.Status, resp.StatusCode) {
			t.Errorf("%s: status %d, want %v; %s", row.About, resp.StatusCode, want.Status, body)
		}
		for name, pattern := range want.Headers {
			if v := resp.Header.Get(name); !regexp.MustCompile(inTheLab.Replace(pattern)).MatchString(v) {
				t.Errorf("%s is %q, want %s", name, v, pattern)
			}
		}
		for _, name := range want.Absent {
			if resp.Header.Get(name) != "" {
				t.Errorf("%s is there", name)
			}
		}
		if !regexp.MustCompile(inTheLab.Replace(fill(want.Body))).MatchString(body) {
			t.Errorf("the body is %q, want %s", body, want.Body)
		}
		c.checkAnswer(t, resp, body, row.Pod, row.Credentials)
	}
	checkThen(t, conn, replies, row.Then)
	if n := len(shared.IMDS.Requests(c.node.Addrs()...)) - upstream; n > 0 && !row.Upstream {
		t.Errorf("the real endpoint has seen %d requests", n)
	}
	return late
}

func newConforming(t *testing.T, flags ...string) *conforming {
	t.Helper()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{IPv4Only: true})
	c := &conforming{node: n, pods: map[string]*lab.Pod{}, roles: map[string]string{}}
	open, closed, hidden := shared.Unique("open"), shared.Unique("closed"), shared.Unique("hidden")
	for namespace, allowed := range map[string]string{
		open: `["arn:aws:iam::123456789012:role/*"]`, closed: `["arn:aws:iam::123456789012:role/nobody"]`, hidden: `["arn:aws:iam::123456789012:role/*"]`,
	} {
		if err := shared.Namespace(ctx, namespace, map[string]string{"iam.amazonaws.com/allowed-roles": allowed}); err != nil {
			t.Fatal(err)
		}
	}
	// The daemon may read every namespace but one.
	rules := slices.Clone(lab.Permissions)
	rules[0].Resources = []string{"pods", "serviceaccounts"}
	rules = append(rules, rbacv1.PolicyRule{
		APIGroups: []string{""}, Resources: []string{"namespaces"}, Verbs: []string{"get", "list", "watch"}, ResourceNames: []string{open, closed},
	})
	if err := n.SetPermissions(ctx, rules); err != nil {
		t.Fatal(err)
	}
	add := func(name, namespace, role string, s lab.PodSpec) {
		t.Helper()
		account := "sa-" + name
		annotations := map[string]string{}
		if role != "" {
			annotations[roleAnnotation] = role
		}
		if err := shared.ServiceAccount(ctx, namespace, account, annotations); err != nil {
			t.Fatal(err)
		}
		s.Namespace, s.ServiceAccount = namespace, account
		c.pods[name], c.roles[name] = labtest.Pod(t, n, s), role
	}
	arn := func(name string) string {
		t.Helper()
		arn, err := n.Role(name, aws.ActionListBuckets)
		if err != nil {
			t.Fatal(err)
		}
		return arn
	}
	refused := "arn:aws:iam::123456789012:role/refused"
	if err := n.AWS.SetRole(aws.Role{ARN: refused}); err != nil {
		t.Fatal(err)
	}
	down := arn("down")
	t.Cleanup(n.AWS.Inject(aws.Fault{RoleARN: down, Hang: true}))
	add("role", open, arn("team/my-role"), lab.PodSpec{})
	add("other", open, arn("other-role"), lab.PodSpec{})
	add("special", open, arn("my+role=,.@-_x"), lab.PodSpec{})
	add("no-role", open, "", lab.PodSpec{})
	add("denied", closed, arn("team/my-role"), lab.PodSpec{})
	add("invalid", open, "arn:oops", lab.PodSpec{})
	add("sts-denied", open, refused, lab.PodSpec{})
	add("sts-down", open, down, lab.PodSpec{})
	add("unknown", open, arn("team/my-role"), lab.PodSpec{Pending: true})
	add("ambiguous", open, arn("team/my-role"), lab.PodSpec{})
	labtest.Pod(t, n, lab.PodSpec{Namespace: open, IP: c.pods["ambiguous"].IPs[0], Detached: true})

	labtest.Daemon(t, n, flags...)
	add("incomplete", hidden, arn("team/my-role"), lab.PodSpec{})
	for _, name := range []string{"role", "other", "special"} {
		served(t, n, c.pods[name], c.roles[name])
	}
	// STS's refusal is remembered from here on.
	session := map[string]string{"X-Aws-Ec2-Metadata-Token": token(t, c.pods["sts-denied"])}
	labtest.Eventually(t, func() error {
		status, body, err := ask(ctx, c.pods["sts-denied"], http.MethodGet, endpoint+roleList, session)
		if err == nil && status != 403 {
			err = fmt.Errorf("STS refuses the role, the answer is %d: %s", status, body)
		}
		return err
	})
	status, body, err := ask(ctx, c.pods["role"], http.MethodPut, endpoint+tokenPath, map[string]string{"X-Aws-Ec2-Metadata-Token-Ttl-Seconds": "1"})
	if err != nil || status != 200 {
		t.Fatalf("token for a second: %d %v", status, err)
	}
	c.expired = body
	return c
}

var (
	repeated  = regexp.MustCompile(`\{([xh])\*(\d+)\}`)
	accessKey = regexp.MustCompile(`A[SK]IA[A-Z0-9]{16}`)
)

// placeholders returns what fills in those of the table.
func (c *conforming) placeholders(t *testing.T, pod, request string) func(string) string {
	t.Helper()
	role := c.roles[pod]
	pairs := []string{"{B}", strings.TrimSuffix(roleList, "/"), "{arn}", role, "{escaped-arn}", url.QueryEscape(role)}
	if _, path, ok := strings.Cut(role, ":role/"); ok {
		pairs = append(pairs, "{path}", path, "{role}", path[strings.LastIndexByte(path, '/')+1:])
	}
	if strings.Contains(request, "token") {
		own := token(t, c.pods[pod])
		pairs = append(pairs, "{token}", own, "{short-token}", own[:len(own)-1], "{upper-token}", strings.ToUpper(own),
			"{token-of-other}", token(t, c.pods["other"]), "{expired-token}", c.expired)
	}
	replace := strings.NewReplacer(pairs...).Replace
	return func(s string) string {
		return repeated.ReplaceAllStringFunc(replace(s), func(m string) string {
			p := repeated.FindStringSubmatch(m)
			n, _ := strconv.Atoi(p[2])
			if p[1] == "x" {
				return strings.Repeat("x", n)
			}
			var b strings.Builder
			for i := range n {
				fmt.Fprintf(&b, "\r\nX-%d: %d", i, i)
			}
			return "X-H: h" + b.String()
		})
	}
}

// latin1 makes each character one byte.
func latin1(s string) string {
	var b strings.Builder
	for _, r := range s {
		b.WriteByte(byte(r))
	}
	return b.String()
}

func readReply(r *bufio.Reader, method string) (*http.Response, string, error) {
	resp, err := http.ReadResponse(r, &http.Request{Method: method})
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	return resp, string(body), err
}

// checkAnswer checks what holds for every answer to the pod.
func (c *conforming) checkAnswer(t *testing.T, resp *http.Response, body, pod string, wantCredentials bool) {
	t.Helper()
	if n, err := strconv.Atoi(resp.Header.Get("Content-Length")); err != nil || resp.Request.Method != http.MethodHead && n != len(body) {
		t.Errorf("Content-Length %q of %d bytes", resp.Header.Get("Content-Length"), len(body))
	}
	for name, want := range map[string]string{"Server": "EC2ws", "Content-Type": "text/plain"} {
		if got := resp.Header.Get(name); got != want {
			t.Errorf("%s is %q, want %s", name, got, want)
		}
	}
	if len(resp.TransferEncoding) > 0 {
		t.Errorf("Transfer-Encoding: %v", resp.TransferEncoding)
	}
	if resp.StatusCode/100 == 3 {
		t.Errorf("redirect to %q", resp.Header.Get("Location"))
	}
	if resp.StatusCode != http.StatusOK && body != "" && (!strings.Contains(body, " ") || json.Valid([]byte(body))) {
		t.Errorf("the body of an error is %q", body)
	}
	keys := accessKey.FindAllString(body, -1)
	if !wantCredentials && (len(keys) > 0 || strings.Contains(body, "SecretAccessKey")) {
		t.Errorf("there are credentials in the answer: %v", keys)
	}
	for _, key := range keys {
		if owner, ok := c.node.AWS.Owner(key); !ok || owner.Node || owner.RoleARN != c.roles[pod] {
			t.Errorf("the credentials are those of %+v", owner)
		}
	}
	if err := stolen(body); err != nil {
		t.Error(err)
	}
}

// checkThen checks whether the connection goes on.
func checkThen(t *testing.T, conn net.Conn, replies *bufio.Reader, then string) {
	t.Helper()
	switch then {
	case "":
	case "closed":
		if rest, err := io.ReadAll(replies); len(rest) > 0 || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("the connection is not closed: %q, %v", rest, err)
		}
	case "open":
		if _, err := io.WriteString(conn, "GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if _, body, err := readReply(replies, http.MethodGet); err != nil || body != "latest" {
			t.Errorf("the connection does not go on: %v %q", err, body)
		}
	default:
		t.Fatalf("then: %q", then)
	}
}
