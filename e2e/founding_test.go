package e2e_test

import (
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/imds"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

const roleAnnotation = "eks.amazonaws.com/role-arn"

// awsCLI is Debian's. The name alone may be another one's on the machine's PATH.
const awsCLI = "/usr/bin/aws"

// The two founding scenarios with nothing but defaults: a pod whose service account names a role lists with it; a pod whose
// service account does not has no credentials, and says so soon.
func TestLabWebIdentity(t *testing.T) {
	t.Parallel()
	n := labtest.Node(t, shared, lab.NodeOptions{})
	d := labtest.Daemon(t, n, "-issuer", "web-identity")
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "team/cart")
	with := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	without := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "visitor"})

	lists(t, n, with, role)
	listsNothing(t, n, without)
	labtest.Untouched(t, n, imds.Expected{})

	for _, c := range n.AWS.Calls() {
		if c.Operation == "AssumeRole" {
			t.Errorf("the node's own role was used: %+v", c)
		}
	}
	keepsSecrets(t, d, with, role)
}

// keepsSecrets checks that the daemon tells of a pod's session what an auditor needs, and nobody its secrets.
func keepsSecrets(t *testing.T, d *lab.Daemon, p *lab.Pod, role string) {
	t.Helper()
	ctx := labtest.Context(t)
	doc := served(t, d.Node, p, role)
	line, err := d.Log().Wait(ctx, "session issued", doc.AccessKeyId)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{p.Namespace, p.ServiceAccount, role, p.Namespace + "." + p.ServiceAccount + "@" + d.Node.Name, "expires", "sts_request_id"} {
		if !strings.Contains(line, want) {
			t.Errorf("the audit line does not hold %s: %s", want, line)
		}
	}
	metrics, err := d.Ops(ctx, "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	told := map[string]string{"log": d.Log().String(), "metrics": metrics}
	for _, path := range []string{"/", "/debug/pods"} {
		if told[path], err = d.Debug(ctx, path); err != nil {
			t.Errorf("debug %s: %v", path, err)
		}
	}
	for where, text := range told {
		if strings.Contains(text, doc.SecretAccessKey) || strings.Contains(text, doc.Token) {
			t.Errorf("%s holds a secret", where)
		}
	}
	if !strings.Contains(told["/debug/pods"], p.Name) {
		t.Errorf("/debug/pods does not know %s: %s", p.Name, told["/debug/pods"])
	}
}

// With assume-role the namespace has to consent. The refusal says how, and doing what it says is enough.
func TestLabAssumeRole(t *testing.T) {
	t.Parallel()
	ctx := labtest.Context(t)
	n := labtest.Node(t, shared, lab.NodeOptions{Network: lab.Bridge})
	labtest.Daemon(t, n)
	shop := shared.Unique("shop")
	role := serviceAccount(t, n, shop, "cart", "team/cart")
	with := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "cart"})
	without := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, ServiceAccount: "visitor"})

	labtest.Eventually(t, func() error { return wantStatus(with, roleList, 403) }) // before the namespace consents
	_, refusal := get(t, with, roleList)
	event, err := with.WaitEvent(ctx, "RoleDenied")
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{"answer": refusal, "Event": event.Message} {
		if !strings.Contains(text, role) || !strings.Contains(text, shop) {
			t.Errorf("the %s does not name role and namespace: %s", what, text)
		}
	}
	name, value := annotationTold(t, refusal)
	if eventName, eventValue := annotationTold(t, event.Message); eventName != name || eventValue != value {
		t.Errorf("the Event tells another annotation: %s", event.Message)
	}
	t.Logf("told to annotate the namespace: %s=%s", name, value)
	if err := shared.Namespace(ctx, shop, map[string]string{name: value}); err != nil {
		t.Fatal(err)
	}
	labtest.Eventually(t, func() error { return wantStatus(with, roleList, 200) })

	lists(t, n, with, role)
	listsNothing(t, n, without)
	labtest.Untouched(t, n, imds.Expected{NodeRole: true})
}

// annotationTold finds the one annotation, with its value, that a refusal tells to add.
func annotationTold(t *testing.T, text string) (name, value string) {
	t.Helper()
	m := regexp.MustCompile(`(iam\.amazonaws\.com/[a-z-]+)\s*[:=]\s*'([^']+)'`).FindAllStringSubmatch(text, -1)
	if len(m) != 1 {
		t.Fatalf("the text tells %d annotations to add, want one: %s", len(m), text)
	}
	return m[0][1], m[0][2]
}

// serviceAccount makes a service account with the role annotation and an IAM role that may list, and returns the role's ARN.
func serviceAccount(t *testing.T, n *lab.Node, namespace, name, role string) string {
	t.Helper()
	arn, err := n.Role(role, aws.ActionListBuckets, aws.ActionListGroups)
	if err != nil {
		t.Fatal(err)
	}
	if err := shared.ServiceAccount(labtest.Context(t), namespace, name, map[string]string{roleAnnotation: arn}); err != nil {
		t.Fatal(err)
	}
	return arn
}

// needCLI fails the test where the AWS CLI is missing.
func needCLI(t *testing.T) {
	t.Helper()
	if _, err := os.Stat(awsCLI); err != nil {
		t.Fatalf("%v: apt-get install -y --no-install-recommends awscli", err)
	}
}

// lists lets the AWS CLI in the pod list buckets and groups, and checks with AWS that it was the role that did.
func lists(t *testing.T, n *lab.Node, p *lab.Pod, role string) {
	t.Helper()
	needCLI(t)
	ctx := labtest.Context(t)
	for operation, run := range map[string]struct {
		args, want []string
	}{
		"ListBuckets": {[]string{"s3", "ls"}, lab.Buckets},
		"ListGroups":  {[]string{"iam", "list-groups"}, lab.Groups},
	} {
		out, err := p.Command(ctx, awsCLI, run.args...).CombinedOutput()
		if err != nil {
			t.Errorf("aws %v: %v: %s", run.args, err, out)
			continue
		}
		for _, want := range run.want {
			if !strings.Contains(string(out), want) {
				t.Errorf("aws %v does not list %s: %s", run.args, want, out)
			}
		}
		calls, err := n.AWS.WaitCalls(ctx, 1, func(c aws.Call) bool { return c.Operation == operation && c.Outcome == aws.OK })
		if err != nil {
			t.Error(err)
			continue
		}
		for _, c := range calls {
			owner, ok := n.AWS.Owner(c.AccessKeyID)
			if !ok || owner.RoleARN != role || owner.Node {
				t.Errorf("%s was signed by %+v, want the role %s", operation, owner, role)
			}
		}
	}
}

// listsNothing checks that the pod has no credentials: the endpoint says so in at most 1.5 s, and the CLI believes it.
func listsNothing(t *testing.T, n *lab.Node, p *lab.Pod) {
	t.Helper()
	needCLI(t)
	ctx := labtest.Context(t)
	before := len(n.AWS.Calls())
	soon(t, "an answer without a role", 1500*time.Millisecond, func() { labtest.Eventually(t, func() error { return wantStatus(p, roleList, 404) }) })
	_, text := get(t, p, roleList)
	if !strings.Contains(text, roleAnnotation) {
		t.Errorf("the answer does not say what is missing: %s", text)
	}
	for _, args := range [][]string{{"s3", "ls"}, {"iam", "list-groups"}} {
		run := func(env ...string) time.Duration {
			t.Helper()
			cmd := p.Command(ctx, awsCLI, args...)
			cmd.Env = append(cmd.Env, env...)
			start := time.Now()
			out, err := cmd.CombinedOutput()
			if _, ok := err.(*exec.ExitError); !ok || !strings.Contains(string(out), "Unable to locate credentials") {
				t.Errorf("aws %v without a role: %v: %s", args, err, out)
			}
			return time.Since(start)
		}
		// What the CLI needs beside the endpoint, it needs without asking it too; more on a machine that is busy at the moment.
		for attempt := 1; ; attempt++ {
			base := run("AWS_EC2_METADATA_DISABLED=true")
			elapsed := run()
			t.Logf("aws %v: no credentials after %v, %v without asking", args, elapsed.Round(time.Millisecond), base.Round(time.Millisecond))
			if elapsed-base <= 1500*time.Millisecond {
				break
			}
			if attempt == 3 {
				t.Errorf("aws %v takes %v to find that there are no credentials, %v when it does not ask", args, elapsed, base)
				break
			}
		}
	}
	if after := len(n.AWS.Calls()); after != before {
		t.Errorf("AWS was called %d times", after-before)
	}
}
