// Package broken_test breaks set-ups in the ways that people break them, and asks what each of them hears: the pod by its
// answer and its Events, the operator by the status page, its JSON and -check. docs/diagnosis.md is made of the same table.
package broken_test

import (
	"context"
	"encoding/json"
	"fmt"
	"html"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/imdsgate/imdsgate/e2e/aws"
	"github.com/imdsgate/imdsgate/e2e/lab"
	"github.com/imdsgate/imdsgate/e2e/labtest"
)

var shared *lab.Lab

func TestMain(m *testing.M) { os.Exit(labtest.Main(m, func(l *lab.Lab) { shared = l })) }

const (
	roleAnnotation = "eks.amazonaws.com/role-arn"
	allowed        = "iam.amazonaws.com/allowed-roles"
	permitted      = "iam.amazonaws.com/permitted"
	base           = "arn:aws:iam::" + lab.Account + ":role/"
	cart           = base + "cart"
	roleList       = "/latest/meta-data/iam/security-credentials/"
)

// broken is one way to get nothing. In its texts the namespace is called shop, the service account cart and the pod cart-1.
type broken struct {
	name    string
	issuer  string // of the daemon; empty: assume-role
	symptom string // for the docs

	namespace map[string]string // annotations
	account   map[string]string
	pod       map[string]string
	role      *aws.Role       // beside cart, which trusts as it should
	prepare   func(*lab.Node) // before the pod is bound
	twin      bool            // a second pod has its IP
	gone      bool            // the service account was deleted

	status int    // of the answer
	event  string // its reason
	state  string // on the page
	says   string // in Event, answer, page, JSON and -check alike
	fix    string // the same
	told   string // in the Event and the answer, where they may say less than the page; empty: says
}

var permits = map[string]string{allowed: `["` + base + `*"]`}

var table = []broken{
	{
		name: "no annotation", symptom: "nothing names a role", namespace: permits,
		status: 404, event: "NoRole", state: "no role",
		says: "service account shop/cart has no eks.amazonaws.com/role-arn annotation",
		fix:  "kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/role-arn=arn:aws:iam::ACCOUNT:role/ROLE",
	},
	{
		name: "account gone", symptom: "the service account was deleted", namespace: permits, account: map[string]string{roleAnnotation: cart}, gone: true,
		status: 404, event: "NoRole", state: "no role",
		says: "service account shop/cart does not exist, so it has no eks.amazonaws.com/role-arn annotation",
		fix:  "kubectl create serviceaccount -n shop cart && kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/role-arn=arn:aws:iam::ACCOUNT:role/ROLE",
	},
	{
		name: "role on the pod", symptom: "the annotation is on the pod instead of the service account", namespace: permits,
		pod:    map[string]string{roleAnnotation: cart},
		status: 404, event: "NoRole", state: "refused",
		says: "annotation eks.amazonaws.com/role-arn of pod shop/cart-1 has no effect, it belongs on the service account",
		fix:  "kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/role-arn=" + cart,
	},
	{
		name: "kube2iam's annotation", symptom: "kube2iam's or kiam's pod annotation, without -pod-annotations", namespace: permits,
		pod:    map[string]string{"iam.amazonaws.com/role": cart},
		status: 404, event: "NoRole", state: "refused",
		says: "annotation iam.amazonaws.com/role of pod shop/cart-1 counts with -pod-annotations alone",
		fix:  "kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/role-arn=" + cart,
	},
	{
		name: "kube2iam's annotation on the account", symptom: "kube2iam's annotation on the service account", namespace: permits,
		account: map[string]string{"iam.amazonaws.com/role": cart},
		status:  404, event: "NoRole", state: "refused",
		says: "annotation iam.amazonaws.com/role of service account shop/cart has no effect, it is for pods",
		fix:  "kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/role-arn=" + cart,
	},
	{
		name: "mistyped", symptom: "a typing error in the annotation's name", namespace: permits,
		account: map[string]string{"eks.amazonaws.com/role_arn": cart},
		status:  404, event: "NoRole", state: "refused",
		says: "annotation eks.amazonaws.com/role_arn of service account shop/cart has no effect, imdsgate reads none of this name",
		fix:  "kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/role-arn=" + cart,
	},
	{
		name: "namespace", symptom: "the namespace permits nothing", account: map[string]string{roleAnnotation: cart},
		status: 403, event: "RoleDenied", state: "refused",
		says: "namespace shop does not permit role " + cart + ": it permits none, it has no iam.amazonaws.com/allowed-roles annotation",
		fix:  `kubectl annotate namespace shop iam.amazonaws.com/allowed-roles='["` + cart + `"]'`,
	},
	{
		name: "other roles", symptom: "the namespace permits other roles", account: map[string]string{roleAnnotation: cart},
		namespace: map[string]string{allowed: `["` + base + `web-*"]`},
		status:    403, event: "RoleDenied", state: "refused",
		says: "no pattern of its iam.amazonaws.com/allowed-roles annotation matches",
		fix:  `kubectl annotate namespace shop iam.amazonaws.com/allowed-roles='["` + base + `web-*","` + cart + `"]' --overwrite`,
	},
	{
		name: "not anchored", symptom: "a regular expression that matches a part of the ARN", account: map[string]string{roleAnnotation: cart},
		namespace: map[string]string{permitted: "role/ca"},
		status:    403, event: "RoleDenied", state: "refused",
		says: "its iam.amazonaws.com/permitted annotation, which must match the whole ARN, does not",
		fix:  `kubectl annotate namespace shop iam.amazonaws.com/permitted='role/ca|arn:aws:iam::123456789012:role/cart' --overwrite`,
	},
	{
		name: "no JSON", symptom: "allowed-roles is no JSON list", account: map[string]string{roleAnnotation: cart},
		namespace: map[string]string{allowed: cart},
		status:    403, event: "RoleDenied", state: "refused",
		says: `"` + cart + `" is no JSON list of strings such as`,
		fix:  `kubectl annotate namespace shop iam.amazonaws.com/allowed-roles='["` + cart + `"]' --overwrite`,
	},
	{
		name: "short patterns", symptom: "allowed-roles as kube2iam takes it, without -base-role-arn", account: map[string]string{roleAnnotation: cart},
		namespace: map[string]string{allowed: `["web-*","cart"]`},
		status:    403, event: "RoleDenied", state: "refused",
		says: `pattern "web-*" does not begin with arn:, and imdsgate runs without -base-role-arn, which would complete it`,
		fix:  "run imdsgate with -base-role-arn, as kube2iam with --base-role-arn, or begin each pattern with arn:",
	},
	{
		name: "no expression", symptom: "permitted is no regular expression", account: map[string]string{roleAnnotation: cart},
		namespace: map[string]string{permitted: "(role/cart"},
		status:    403, event: "RoleDenied", state: "refused",
		says: `"(role/cart" is no regular expression: missing closing )`,
		fix:  "kubectl annotate namespace shop iam.amazonaws.com/permitted='" + cart + "' --overwrite",
	},
	{
		name: "user", symptom: "the ARN of a user", namespace: permits, account: map[string]string{roleAnnotation: "arn:aws:iam::123456789012:user/cart"},
		status: 403, event: "InvalidRoleARN", state: "refused",
		says: "it names a thing of the kind user, not a role: its resource must begin with role/",
		fix:  "kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/role-arn=arn:aws:iam::ACCOUNT:role/ROLE --overwrite",
	},
	{
		name: "digits", symptom: "an account of 11 digits", namespace: permits, account: map[string]string{roleAnnotation: "arn:aws:iam::12345678901:role/cart"},
		status: 403, event: "InvalidRoleARN", state: "refused",
		says: `its account "12345678901" is not 12 digits`,
		fix:  "kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/role-arn=arn:aws:iam::ACCOUNT:role/ROLE --overwrite",
	},
	{
		name: "quoted", symptom: "quotes or white space around the ARN", namespace: permits, account: map[string]string{roleAnnotation: `"` + cart + `"`},
		status: 403, event: "InvalidRoleARN", state: "refused",
		says: "quotes or white space are around it",
		fix:  "kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/role-arn=" + cart + " --overwrite",
	},
	{
		name: "short name", symptom: "a short role name without -base-role-arn", namespace: permits, account: map[string]string{roleAnnotation: "cart"},
		status: 403, event: "InvalidRoleARN", state: "refused",
		says: "short role names need imdsgate to run with -base-role-arn",
		fix:  "kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/role-arn=arn:aws:iam::ACCOUNT:role/ROLE --overwrite",
	},
	{
		name: "duration", symptom: "a session duration that is none", namespace: permits,
		account: map[string]string{roleAnnotation: cart, "imdsgate.dev/session-duration": "15m"},
		status:  403, event: "InvalidAnnotation", state: "refused",
		says: `annotation imdsgate.dev/session-duration of service account shop/cart: "15m": sessions last from 45m to 12h`,
		fix:  "kubectl annotate serviceaccount -n shop cart imdsgate.dev/session-duration=1h --overwrite",
	},
	{
		name: "trust", symptom: "the role does not trust the node's role, or does not exist (assume-role)", namespace: permits,
		account: map[string]string{roleAnnotation: base + "untrusting"}, role: &aws.Role{ARN: base + "untrusting"},
		status: 403, event: "CredentialsFailed", state: "failing",
		says: "AssumeRole " + base + "untrusting: AccessDenied: User: arn:aws:sts::123456789012:assumed-role/node-role/i-0123456789abcdef0 is not authorized to perform: sts:AssumeRole",
		fix:  `add to its trust policy (with the path of the principal, if it has one): {"Effect":"Allow","Principal":{"AWS":"` + lab.NodeRoleARN + `"},"Action":"sts:AssumeRole"}`,
	},
	{
		name: "external ID", symptom: "the role wants another external ID than the one annotated", namespace: permits,
		account: map[string]string{roleAnnotation: base + "external", "imdsgate.dev/external-id": "wrong"},
		role:    &aws.Role{ARN: base + "external", Trust: []aws.Trust{{AWS: lab.NodeRoleARN, ExternalID: "right"}}},
		status:  403, event: "CredentialsFailed", state: "failing",
		says: "AssumeRole " + base + "external: AccessDenied",
		fix:  `"Condition":{"StringEquals":{"sts:ExternalId":"<the external ID of the annotation>"}}}`,
	},
	{
		name: "external ID not annotated", symptom: "the role wants an external ID that is not annotated", namespace: permits,
		account: map[string]string{roleAnnotation: base + "partner"},
		role:    &aws.Role{ARN: base + "partner", Trust: []aws.Trust{{AWS: lab.NodeRoleARN, ExternalID: "right"}}},
		status:  403, event: "CredentialsFailed", state: "failing",
		says: "AssumeRole " + base + "partner: AccessDenied",
		fix:  "if it asks for an external ID, annotate imdsgate.dev/external-id",
	},
	{
		name: "denied", symptom: "a policy of the organization denies it", namespace: permits, account: map[string]string{roleAnnotation: base + "denied"},
		prepare: deny("denied", "with an explicit deny in a service control policy"),
		status:  403, event: "CredentialsFailed", state: "failing",
		says: "with an explicit deny in a service control policy",
		fix:  "find the statement with Effect Deny in the service control policy and except this role from it",
	},
	{
		name: "node's policy", symptom: "the node's role has no policy that allows it", namespace: permits, account: map[string]string{roleAnnotation: base + "unallowed"},
		prepare: deny("unallowed", "because no identity-based policy allows the sts:AssumeRole action"),
		status:  403, event: "CredentialsFailed", state: "failing",
		says: "because no identity-based policy allows the sts:AssumeRole action",
		fix:  `add to the policy of the node's role: {"Effect":"Allow","Action":"sts:AssumeRole","Resource":"` + base + `unallowed"}`,
	},
	{
		name: "clock", symptom: "the node's clock is wrong", namespace: permits, account: map[string]string{roleAnnotation: base + "clock"},
		prepare: func(n *lab.Node) {
			n.AWS.Inject(aws.Fault{RoleARN: base + "clock", Status: 403, Code: "SignatureDoesNotMatch", Message: "Signature expired: 20261122T000000Z is now earlier than 20261122T004500Z (20261122T010000Z - 15 min.)"})
		},
		status: 503, event: "CredentialsFailed", state: "failing",
		says: "SignatureDoesNotMatch: Signature expired: 20261122T000000Z is now earlier than", told: "STS answered SignatureDoesNotMatch",
		fix: "set the node's clock: STS takes requests for five minutes only (timedatectl on the node says whether NTP works)",
	},
	{
		name: "cut off", symptom: "STS cannot be reached", namespace: permits, account: map[string]string{roleAnnotation: base + "cut"},
		prepare: func(n *lab.Node) { n.AWS.Inject(aws.Fault{RoleARN: base + "cut", Hangup: true}) },
		status:  503, event: "CredentialsFailed", state: "failing",
		says: "STS cannot be reached at https://sts.us-east-1.amazonaws.com/", told: "no credentials available yet",
		fix: "this node must reach STS: check AWS_REGION, AWS_ENDPOINT_URL_STS, HTTPS_PROXY and AWS_CA_BUNDLE of imdsgate, the node's DNS, routes and security groups",
	},
	{
		name: "twins", symptom: "two running pods have one IP", namespace: permits, account: map[string]string{roleAnnotation: cart},
		twin:   true,
		status: 503, event: "AmbiguousIP", state: "refused",
		says: "more than one running pod has this IP",
		fix:  "delete one of the pods that have this IP; if it happens again, the network plugin gives addresses twice",
	},
	{
		name: "trust policy", issuer: "web-identity", symptom: "the trust policy names another service account (web-identity)",
		account: map[string]string{roleAnnotation: base + "theirs"},
		role:    &aws.Role{ARN: base + "theirs", Trust: []aws.Trust{{Federated: lab.ProviderARN(), Subject: "system:serviceaccount:shop:till", Audience: "sts.amazonaws.com"}}},
		status:  403, event: "CredentialsFailed", state: "failing",
		says: "AssumeRoleWithWebIdentity " + base + "theirs: AccessDenied: Not authorized to perform sts:AssumeRoleWithWebIdentity",
		fix: `add to its trust policy: {"Effect":"Allow","Principal":{"Federated":"` + lab.ProviderARN() + `"},"Action":"sts:AssumeRoleWithWebIdentity",` +
			`"Condition":{"StringEquals":{"172.30.0.1:6443:aud":"sts.amazonaws.com","172.30.0.1:6443:sub":"system:serviceaccount:shop:cart"}}}`,
	},
	{
		name: "provider", issuer: "web-identity", symptom: "the role's account has no OIDC provider for the cluster (web-identity)",
		account: map[string]string{roleAnnotation: "arn:aws:iam::999999999999:role/cart"},
		status:  403, event: "CredentialsFailed", state: "failing",
		says: "InvalidIdentityToken: No OpenIDConnect provider found in your account for https://172.30.0.1:6443",
		fix:  "create an IAM OIDC provider for the cluster's issuer in account 999999999999: aws iam create-open-id-connect-provider --url https://172.30.0.1:6443 --client-id-list sts.amazonaws.com",
	},
	{
		name: "client ID", issuer: "web-identity", symptom: "the OIDC provider does not take the audience (web-identity)",
		account: map[string]string{roleAnnotation: cart, "eks.amazonaws.com/audience": "vault"},
		status:  403, event: "CredentialsFailed", state: "failing",
		says: "InvalidIdentityToken: Incorrect token audience",
		fix:  "aws iam add-client-id-to-open-id-connect-provider --open-id-connect-provider-arn " + lab.ProviderARN() + " --client-id vault",
	},
	{
		name: "audience", issuer: "web-identity", symptom: "an audience that -audiences does not name (web-identity)",
		account: map[string]string{roleAnnotation: cart, "eks.amazonaws.com/audience": "anything"},
		status:  403, event: "InvalidAnnotation", state: "refused",
		says: `"anything" is none of the audiences that imdsgate was given with -audiences`,
		fix:  "add it to -audiences, or kubectl annotate serviceaccount -n shop cart eks.amazonaws.com/audience=sts.amazonaws.com --overwrite",
	},
	{
		name: "external ID with a token", issuer: "web-identity", symptom: "an external ID (web-identity)",
		account: map[string]string{roleAnnotation: cart, "imdsgate.dev/external-id": "mine"},
		status:  403, event: "InvalidAnnotation", state: "refused",
		says: "AssumeRoleWithWebIdentity takes no external ID",
		fix:  "remove the annotation and let the role's trust policy name the service account instead",
	},
}

// deny makes STS refuse a role in the words of IAM's user guide: its stand-in has no such policies.
func deny(role, why string) func(*lab.Node) {
	return func(n *lab.Node) {
		n.AWS.Inject(aws.Fault{
			RoleARN: base + role, Status: 403, Code: "AccessDenied",
			Message: "User: arn:aws:sts::123456789012:assumed-role/node-role/i-0123456789abcdef0 is not authorized to perform: sts:AssumeRole on resource: " + base + role + " " + why,
		})
	}
}

var daemonFlags = map[string][]string{
	"":             {"-sts-rate", "100"},
	"web-identity": {"-issuer", "web-identity", "-audiences", "sts.amazonaws.com,vault"},
}

// TestBroken: the answer, the Event, the page, its JSON and -check say the same of each set-up, and the same fix; where that is a
// command, the pod is served once it was typed.
func TestBroken(t *testing.T) {
	for issuer, flags := range daemonFlags {
		t.Run("issuer "+issuer, func(t *testing.T) {
			t.Parallel()
			n := labtest.Node(t, shared, lab.NodeOptions{})
			if _, err := n.Role("cart"); err != nil {
				t.Fatal(err)
			}
			d := labtest.Daemon(t, n, flags...)
			operator := labtest.Node(t, shared, lab.NodeOptions{})
			err := operator.SetPermissions(labtest.Context(t), []rbacv1.PolicyRule{{APIGroups: []string{""}, Resources: []string{"serviceaccounts", "namespaces"}, Verbs: []string{"get", "create", "patch"}}})
			if err != nil {
				t.Fatal(err)
			}
			for _, tt := range table {
				if tt.issuer == issuer {
					t.Run(tt.name, func(t *testing.T) { tt.test(t, n, d, operator) })
				}
			}
		})
	}
}

func (tt broken) test(t *testing.T, n *lab.Node, d *lab.Daemon, operator *lab.Node) {
	t.Parallel()
	ctx := labtest.Context(t)
	shop := shared.Unique("shop")
	if err := shared.Namespace(ctx, shop, tt.namespace); err != nil {
		t.Fatal(err)
	}
	if err := shared.ServiceAccount(ctx, shop, "cart", tt.account); err != nil {
		t.Fatal(err)
	}
	if tt.role != nil {
		if err := n.AWS.SetRole(*tt.role); err != nil {
			t.Fatal(err)
		}
	}
	if tt.prepare != nil {
		tt.prepare(n)
	}
	asking := labtest.Pod(t, n, lab.PodSpec{Namespace: shop, Name: "cart-1", ServiceAccount: "cart", Annotations: tt.pod})
	if tt.twin {
		labtest.Pod(t, n, lab.PodSpec{Namespace: shop, Name: "twin", ServiceAccount: "cart", IP: asking.IPs[0], Detached: true})
	}
	if tt.gone {
		if err := shared.Kube.CoreV1().ServiceAccounts(shop).Delete(ctx, "cart", metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	// The table speaks of namespace shop.
	names := strings.NewReplacer("shop/", shop+"/", "namespace shop", "namespace "+shop, "-n shop ", "-n "+shop+" ", ":shop:cart", ":"+shop+":cart")
	says, fix := names.Replace(tt.says), names.Replace(tt.fix)
	told := says
	if tt.told != "" {
		told = tt.told
	}
	holds := func(who, text string, wants ...string) {
		t.Helper()
		for _, want := range wants {
			if !strings.Contains(text, want) {
				t.Errorf("%s does not say\n  %s\nbut\n  %s", who, want, text)
			}
		}
	}

	var body string
	labtest.Eventually(t, func() (err error) {
		body, err = answers(ctx, t, asking, tt.status, fix)
		return err
	})
	holds("the answer", body, told, fix)
	if len(body) > 1<<10 {
		t.Errorf("the answer has %d bytes", len(body))
	}

	e, err := asking.WaitEvent(ctx, tt.event)
	if err != nil {
		t.Fatal(err)
	}
	holds("the Event", e.Message, told, fix)
	wantKind, wantType := "Pod", "Warning"
	if tt.event == "InvalidRoleARN" || tt.event == "InvalidAnnotation" {
		wantKind = "ServiceAccount"
	}
	if tt.event == "NoRole" {
		wantType = "Normal"
	}
	if e.InvolvedObject.Kind != wantKind || e.Type != wantType {
		t.Errorf("the Event is a %s on a %s", e.Type, e.InvolvedObject.Kind)
	}

	p := podOf(ctx, t, d, shop)
	if p.Status != tt.state {
		t.Errorf("the page says %q, want %q", p.Status, tt.state)
	}
	problem := p.Problem
	if tt.state == "no role" { // it may be meant so: told step by step, not as a problem
		problem = strings.Join(p.Steps, "\n")
	}
	holds("the JSON", problem, says)
	holds("the JSON's fix", p.Fix, fix)
	page, err := d.Debug(ctx, "/?q="+url.QueryEscape(shop+"/cart-1"))
	if err != nil {
		t.Fatal(err)
	}
	holds("the page", html.UnescapeString(page), says, fix, ">"+tt.state+"<")

	code, out, err := n.RunDaemon(ctx, lab.DaemonOptions{Flags: []string{"-check", shop + "/cart-1"}})
	if err != nil || code != 1 {
		t.Errorf("-check ends with %d %v", code, err)
	}
	holds("-check", out, shop+"/cart-1: "+tt.state, says, "fix: ", fix)

	// A command is typed as it stands, and mends it. Where the reader has to say which role, there is none to type.
	_, command, found := strings.Cut(p.Fix, "kubectl ")
	if !found || strings.Contains(command, "ROLE") {
		return
	}
	kubectl := "KUBECONFIG=" + operator.Kubeconfig() + " " + kubectl(t) + " "
	if out, err := operator.Run(ctx, "sh", "-euc", kubectl+strings.ReplaceAll(command, "kubectl ", kubectl)); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	labtest.Eventually(t, func() error {
		_, err := answers(ctx, t, asking, http.StatusOK, "")
		return err
	})
}

// kubectl is the lab's.
func kubectl(t *testing.T) string {
	cache, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Join(cache, "imdsgate-e2e", "bin", "kubectl")
}

// pod is what the JSON says of one.
type pod struct {
	Namespace, Name, Decision, Status, Problem, Fix string
	Steps                                           []string
}

func podOf(ctx context.Context, t *testing.T, d *lab.Daemon, namespace string) pod {
	t.Helper()
	text, err := d.Debug(ctx, "/debug/pods")
	if err != nil {
		t.Fatal(err)
	}
	var all []pod
	if err := json.Unmarshal([]byte(text), &all); err != nil {
		t.Fatal(err)
	}
	for _, p := range all {
		if p.Namespace == namespace && p.Name == "cart-1" {
			return p
		}
	}
	t.Fatalf("/debug/pods knows no pod in %s: %s", namespace, text)
	return pod{}
}

// answers asks for the pod's role and complains about another status, or an answer without the text.
func answers(ctx context.Context, t *testing.T, p *lab.Pod, want int, text string) (string, error) {
	t.Helper()
	status, body := get(ctx, t, p)
	if status != want || !strings.Contains(body, text) {
		return body, fmt.Errorf("pod %s is answered %d, want %d and %q: %s", p.Name, status, want, text, body)
	}
	return body, nil
}

// get asks for the pod's role.
func get(ctx context.Context, t *testing.T, p *lab.Pod) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://169.254.169.254"+roleList, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := p.HTTP().Do(req)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, err.Error()
	}
	return resp.StatusCode, string(body)
}
