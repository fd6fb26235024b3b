package hostile

import (
	"fmt"
	"math/rand/v2"
	"net/url"
	"slices"
	"strings"
)

// Request is what a hostile pod writes to one connection.
type Request struct {
	Name, Raw string
	// Served: the answer may be a 200, with what any pod may have: its own role and credentials, a session token, metadata of the
	// table. All others must be refused or not answered at all.
	Served bool
}

// Names are what the requests are about.
type Names struct {
	Own, OwnPath string // role of the pod that asks, as last segment and with its path
	Other        string // role of another pod of the node
	Node         string // role of the node
	OtherIP      string // address of another pod
	NodeIP       string // address of the node
}

const (
	list    = "/latest/meta-data/iam/security-credentials"
	host    = "Host: 169.254.169.254\r\n"
	v1      = " HTTP/1.1\r\n"
	ttl     = "X-aws-ec2-metadata-token-ttl-seconds: "
	session = "X-aws-ec2-metadata-token: "
)

// Requests returns the corpus, the same for the same names, each request once.
func Requests(n Names) []Request {
	var all []Request
	seen := map[string]bool{}
	add := func(group string, rs []Request) {
		for i, r := range rs {
			if seen[r.Raw] {
				continue
			}
			seen[r.Raw] = true
			r.Name = fmt.Sprintf("%s-%d", group, i)
			all = append(all, r)
		}
	}
	add("path", paths(n))
	add("trick", tricks(n))
	add("host", hosts(n))
	add("authority", authorities(n))
	add("header", headers(n))
	add("line", lines(n))
	add("method", methods(n))
	add("token", tokens(n))
	add("injection", injections(n))
	add("framing", framing(n))
	add("encoding", encodings(n))
	add("pipeline", pipelines(n))
	add("mutant", mutants(n, slices.Clone(all)))
	return all
}

func get(target string) string { return "GET " + target + v1 + host + "\r\n" }

// paths of every service that answers at the address somewhere, and of the real endpoint below every version it ever had.
func paths(n Names) (rs []Request) {
	versions := strings.Fields(`1.0 2007-01-19 2007-03-01 2007-08-29 2007-10-10 2007-12-15 2008-02-01 2008-09-01 2009-04-04 2011-01-01
		2011-05-01 2012-01-12 2014-02-25 2014-11-05 2015-10-20 2016-04-19 2016-06-30 2016-09-02 2018-03-28 2018-08-17 2018-09-24
		2019-10-01 2020-08-24 2020-10-27 2021-01-03 2021-03-23 2021-07-15 2022-09-24 2024-04-11 Latest LATEST latest. latest%00 v1 0 *`)
	for _, v := range versions {
		for _, p := range []string{"/meta-data/iam/security-credentials/" + n.Node, "/meta-data/iam/security-credentials/" + n.Own, "/user-data", "/dynamic/instance-identity/document", "/api/token"} {
			rs = append(rs, Request{Raw: get("/" + v + p)})
		}
	}
	for _, p := range strings.Fields(`user-data user-data/ dynamic dynamic/ dynamic/instance-identity/document dynamic/instance-identity/pkcs7
		dynamic/instance-identity/signature dynamic/instance-identity/rsa2048 dynamic/fws/instance-monitoring api api/ api/token meta-data
		meta-data/ meta-data/iam meta-data/iam/ meta-data/identity-credentials/ meta-data/identity-credentials/ec2/info
		meta-data/identity-credentials/ec2/security-credentials/ meta-data/identity-credentials/ec2/security-credentials/ec2-instance
		meta-data/managed-ssh-keys/active-keys/ meta-data/managed-ssh-keys/signer-ocsp/ meta-data/public-keys meta-data/public-keys/
		meta-data/public-keys/0/ meta-data/public-keys/0/openssh-key meta-data/public-hostname meta-data/public-ipv4 meta-data/security-groups
		meta-data/tags/instance meta-data/tags/instance/Name meta-data/spot/instance-action meta-data/spot/termination-time
		meta-data/events/maintenance/history meta-data/events/maintenance/scheduled meta-data/events/recommendations/rebalance
		meta-data/autoscaling/target-lifecycle-state meta-data/ami-manifest-path meta-data/ancestor-ami-ids meta-data/block-device-mapping/
		meta-data/block-device-mapping/ami meta-data/elastic-gpus/associations meta-data/elastic-inference/associations meta-data/instance-action
		meta-data/ipv6 meta-data/kernel-id meta-data/network/ meta-data/network/interfaces/ meta-data/network/interfaces/macs/
		meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/ meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/security-groups
		meta-data/network/interfaces/macs/0e:49:61:0f:c3:11/vpc-id meta-data/placement meta-data/placement/ meta-data/placement/group-name
		meta-data/placement/host-id meta-data/placement/partition-number meta-data/product-codes meta-data/profile meta-data/ramdisk-id
		meta-data/reservation-id meta-data/services/ meta-data/system meta-data/metrics/vhostmd attributes/ meta-data.json .json`) {
		rs = append(rs, Request{Raw: get("/latest/" + p)})
	}
	for _, p := range strings.Fields(`/openstack /openstack/latest/meta_data.json /openstack/latest/user_data /openstack/latest/vendor_data.json
		/openstack/latest/network_data.json /computeMetadata/v1/ /computeMetadata/v1/?recursive=true
		/computeMetadata/v1/instance/service-accounts/default/token /computeMetadata/v1beta1/instance/attributes/kube-env?alt=json
		/computeMetadata/v1/project/project-id /0.1/meta-data/service-accounts/default/acquire /metadata/v1.json /metadata/v1/ /metadata/v1/user-data
		/metadata/v1/maintenance /metadata/instance?api-version=2021-02-01 /metadata/identity/oauth2/token?resource=https://vault.azure.net
		/metadata/attested/document /metadata/scheduledevents /hetzner/v1/metadata /hetzner/v1/userdata /opc/v1/instance/ /opc/v2/instance/
		/opc/v1/identity/cert.pem /opc/v2/identity/key.pem /latest/meta-data/ram/security-credentials/ /latest/meta-data/ram/security-credentials/admin
		/instance_identity/v1/token /userdata /metadata /json /conf /user_data /v1.json /v1/ /v1.alias/ /stable/meta-data/
		/v2/credentials/9d1c1d1e-0000-4000-8000-000000000000 /v2/metadata /v3/ /v4/0/task /task /2018-06-01/runtime/invocation/next
		/2016-12-01/credentials /healthz /health?deep=1 /ping /metrics /readyz /livez /debug/store /debug/pods /debug/pprof/ /debug/pprof/heap
		/debug/vars /status /favicon.ico /robots.txt /.well-known/openid-configuration /admin /server-status /index.html /index.php /api/v1/pods
		/pods /run/secrets/kubernetes.io/serviceaccount/token /proc/self/environ /etc/passwd /.git/config /.env /token /credentials
		/latest/meta-data/iam/security-credentials.json /metadata/identity\oauth2\token/ /metadata\identity\oauth2\token`) {
		rs = append(rs, Request{Raw: get(p)})
	}
	// What is passed through, with what must not go along.
	for _, p := range strings.Fields(`placement/region placement/availability-zone/ instance-id mac services/domain ami-id`) {
		for _, t := range []string{
			"?", "?x=1", "?/../iam/security-credentials/" + n.Node, "?url=http://169.254.169.254/latest/user-data", "?%0d%0aX:%20y", "?#", "?" + strings.Repeat("a", 2000), "/?x", "?\u00e9",
		} {
			t = strings.TrimPrefix(t, strings.Repeat("/", strings.Count(p[len(p)-1:], "/")))
			rs = append(rs, Request{Raw: get("/latest/meta-data/" + p + t), Served: true}, Request{Raw: get("http://169.254.169.254/latest/meta-data/" + p + t), Served: true},
				Request{Raw: "HEAD /latest/meta-data/" + p + t + v1 + host + "User-Agent: mallory\r\nX-Forwarded-For: " + n.OtherIP + "\r\nCookie: a=b\r\nRange: bytes=0-1\r\n\r\n", Served: true})
		}
	}
	for _, name := range []string{
		n.Node, n.Node + "/", n.Other, n.Other + "/", "team/" + n.Other, "arn:aws:iam::123456789012:role/" + n.Other, "arn:aws:iam::123456789012:role/" + n.Node,
		"arn%3aaws%3aiam%3a%3a123456789012%3arole%2f" + n.Node, url.PathEscape(n.Other), "*", ".", "..", "%2e%2e", "../" + n.Node, "..%2f" + n.Node, n.Own + "/../" + n.Node,
		n.Own + "/..%2f" + n.Node, n.Own + "%2f..%2f" + n.Node, n.Own + "," + n.Node, n.Own + ";" + n.Node, n.Own + "%00" + n.Node, n.Own + "%0a" + n.Node, n.Own + "%0d%0a" + n.Node,
		n.Own + "\\..\\" + n.Node, n.Own + "#" + n.Node, n.Own + "%23", n.Own + "%3f", n.Own + " " + n.Node, n.Own + "&role=" + n.Node, "default", "admin", "aws-elasticbeanstalk-ec2-role",
		"ec2-instance", "baskinc-role", n.OwnPath + "/" + n.Node, strings.ToUpper(n.Own), strings.ToUpper(n.Node), n.Own + n.Own, n.Own[:len(n.Own)-1], n.Own + "x", "x" + n.Own,
		strings.Repeat("../", 20) + "user-data", strings.Repeat("A", 3000), strings.Repeat("%41", 2000), "%" + n.Own, n.Own + "%", n.Own + "%2", "%25" + n.Own, "\u212bws", n.Own + "\u200b", n.Own + "%e2%80%8b",
	} {
		rs = append(rs, Request{Raw: get(list + "/" + name)})
	}
	return rs
}

// tricks are the ways of writing a path that one parser takes for another path than the next: of filters, normalisers and
// proxies.
func tricks(n Names) (rs []Request) {
	own := list + "/" + n.Own
	bases := []string{list + "/" + n.Node, own, "/latest/user-data", "/latest/meta-data/placement/region", "/latest/dynamic/instance-identity/document"}
	// Between two segments, in place of the slash.
	slashes := strings.Fields(`// /// /./ /././ /%2e/ /x/../ /x/%2e%2e/ /x/..%2f /x%2f../ /%2f %2f %2F %252f %25252f %c0%af %c1%9c %e0%80%af %ef%bc%8f \ \\ %5c %255c /;/ /;x=y/
		;x=y/ /..;/x/ /.;/ /%20/ %20/ /%09/ /%0d/ /%0a/ %0a/ /%00/ %00/ /*/ /?/ ?/ #/ /#/ %23/ /%3f/ &/ | : :/ \/ /\ /~/ /@/ /$/ /,/ %u2215 %u002f ／ ∕ ⁄ ․/ /․․/ /‥/`)
	for i, base := range bases {
		at := []int{1 + strings.Index(base[1:], "/"), strings.LastIndexByte(base, '/')}
		for _, s := range slashes {
			for _, j := range at {
				served := false
				if i == 1 && j == at[1] { // the segment after the list is the role's name, which may be escaped
					name, err := url.PathUnescape(strings.TrimPrefix(base[:j]+s+base[j+1:], list+"/"))
					served = err == nil && strings.TrimSuffix(name, "/") == n.Own
				}
				served = served || strings.HasPrefix(base[:j]+s, list+"?") || strings.HasPrefix(base[:j]+s, list+"/?")
				rs = append(rs, Request{Raw: get(base[:j] + s + base[j+1:]), Served: served})
			}
		}
		for _, p := range strings.Fields(`/. /./ /.. /../ /../../.. /x/.. /%2e /%2e%2e /.%2e /%2e. /..; /..;/ /;/ /;a=b /%3b/ /%252e%252e /%c0%ae%c0%ae /%uff0e%uff0e /．． /‥ // /// /\ /\\ /%5c /%5c.. /..%5c /..\
			/%00 /%0a /%0d%0a /%09 /%20 /%ff /* /? /?/ /# /#/ /~ /~root /@ /169.254.169.254 /http:/169.254.169.254 /http://169.254.169.254 /.well-known /latest/.. /latest/../latest/.. /latest%2f..
			/meta-data/.. /proxy /proxy/169.254.169.254 /plugins/servlet /x?url=http://169.254.169.254 / //169.254.169.254 /.;/x/.. /static/.. /api/..;`) {
			served := strings.HasPrefix(p, "/?")
			rs = append(rs, Request{Raw: get(p + base), Served: served})
		}
		for _, s := range strings.Fields(`/. /./ /.. /../ /..;/ ..;/ ; ;x ;.json .json .html .css .php .xml %00 %00.json %0a %0d %0d%0a %09 %20 %a0 %85 %0c %0b %1f %7f %ff %e2%80%a8 /%2e /%2e%2e /* * ** ~ ~1 ! $ & + , : = @ ' " ( ) [ ] { } < > | ^
			\ \.. /\ // /// //. %2f %2f%2f %252f %5c %26 %3b %3d %23 %3f %40 %2520 %u0000 %25%32%66 .. ... .%00 :$DATA ::$DATA \u0000 \0`) {
			rs = append(rs, Request{Raw: get(base + s), Served: i == 1 && s == "%2f"})
		}
		// Of the letters: case, double and overlong encodings, full width, homographs.
		for j := 1; j < len(base); j += 3 {
			c := base[j]
			for _, s := range []string{fmt.Sprintf("%%%02x", c), fmt.Sprintf("%%25%02x", c), fmt.Sprintf("%%u00%02x", c), fmt.Sprintf("%%c%x%%%02x", c>>6, 0x80|c&0x3f), string(rune(c) + 0xfee0), swapCase(c)} {
				if s == string(c) {
					continue
				}
				mutant := base[:j] + s + base[j+1:]
				name, inName := strings.CutPrefix(mutant, list+"/")
				plain, err := url.PathUnescape(name)
				rs = append(rs, Request{Raw: get(mutant), Served: inName && err == nil && plain == n.Own})
			}
		}
	}
	return rs
}

func swapCase(c byte) string {
	if s := strings.ToUpper(string(c)); s != string(c) {
		return s
	}
	return strings.ToLower(string(c))
}

// notations of the endpoint's address, and of names that resolve to it.
func notations(n Names) []string {
	return append(strings.Fields(`2852039166 7147006462 25180000000 0xa9fea9fe 0xA9FEA9FE 0x41414141A9FEA9FE 025177524776 0025177524776 0xa9.0xfe.0xa9.0xfe 0xa9.0xfe.43518 0xa9.16689662 0251.0376.0251.0376
		0251.00376.000251.0000376 0251.254.169.254 0251.0376.0124776 169.254.43518 169.16689662 425.510.425.510 169.254.169.254. 169.254.169.254.. 169.254.169.254:0 169.254.169.254:8 169.254.169.254:080 169.254.169.254:0080
		169.254.169.254:00080 169.254.169.254:+80 169.254.169.254:81 169.254.169.254:443 169.254.169.254:8080 169.254.169.254:8254 169.254.169.254:65616 169.254.169.254: 169.254.169.254:80: 169.254.169.254:80:80 169.254.169.254:http
		169.254.169.254%00 169.254.169.254%20 169.254.169.254%2f 169.254.169.254/ 169.254.169.254\ 169.254.169.254# 169.254.169.254? 169.254.169.254@evil.example evil.example@169.254.169.254 user:pass@169.254.169.254
		169.254.169.254,evil.example evil.example,169.254.169.254 169.254.169.254;evil.example 169.254.169.254&evil.example 169。254。169。254 169．254．169．254 169｡254｡169｡254 ①⑥⑨.②⑤④.①⑥⑨.②⑤④ １６９.２５４.１６９.２５４
		169.254.169.254.nip.io 169.254.169.254.xip.io 169-254-169-254.sslip.io a9fea9fe.nip.io 1ynrnhl.xip.io www.owasp.org.1ynrnhl.xip.io instance-data instance-data.ec2.internal metadata metadata.google.internal metadata.nicob.net
		imds.localtest.me a9fea9fe.c0a80001.rbndr.us 7f000001.a9fea9fe.rbndr.us make-169.254.169.254-rebind-1.2.3.4.rr.example localhost localhost:80 127.0.0.1 127.0.0.1:8254 127.1 0 0.0.0.0 0.0.0.0:80 [::1] [::] [::]:80 [::1]:9182
		[::ffff:169.254.169.254] [::ffff:a9fe:a9fe] [0:0:0:0:0:ffff:a9fe:a9fe] [0:0:0:0:0:ffff:169.254.169.254] [::169.254.169.254] [64:ff9b::a9fe:a9fe] [fd00:ec2:0::254] [fd00:0ec2::254] [FD00:EC2::254] [fd00:ec2::0254] [fd00:ec2:0:0:0:0:0:254]
		[fd00:ec2::254%eth0] [fd00:ec2::254%25eth0] [fd00:ec2::254]:8254 [fd00:ec2::254]: [fd00:ec2::254] [fd00:ec2::254]:80 fd00:ec2::254 fd00:ec2::254:80 [169.254.169.254] [169.254.169.254]:80 169.254.170.2 169.254.170.23 169.254.169.253 169.254.169.123 169.254.169.255
		100.100.100.200 192.0.0.192 evil.example evil.example:80 xn--fsq.example sts.us-east-1.amazonaws.com kubernetes.default.svc - _ . .. * %`), n.NodeIP, n.NodeIP+":8254", n.OtherIP, n.OtherIP+":80", "a b", "a\tb", "\x00", "\xff", strings.Repeat("a", 5000))
}

var genuine = []string{"169.254.169.254", "169.254.169.254:80", "[fd00:ec2::254]", "[fd00:ec2::254]:80"}

// hosts: DNS rebinding makes a browser or an application send a name; everything but the endpoint's own address is refused.
func hosts(n Names) (rs []Request) {
	for _, h := range notations(n) {
		for _, target := range []string{list + "/" + n.Own, "/latest/api/token"} {
			method := "GET "
			if strings.HasSuffix(target, "token") {
				method = "PUT "
			}
			rs = append(rs, Request{Raw: method + target + v1 + "Host: " + h + "\r\n" + ttl + "60\r\n\r\n", Served: slices.Contains(genuine, h)})
		}
	}
	for _, lines := range []string{
		"Host: 169.254.169.254\r\nHost: evil.example\r\n", "Host: evil.example\r\nHost: 169.254.169.254\r\n", "Host: 169.254.169.254\r\nhost: 169.254.169.254\r\n",
		"Host: evil.example\r\n 169.254.169.254\r\n", "Host: 169.254.169.254\r\n evil.example\r\n", " Host: 169.254.169.254\r\n", "Host : 169.254.169.254\r\n", "Host\t: 169.254.169.254\r\n",
		"X: y\r\n Host: 169.254.169.254\r\nHost: evil.example\r\n", "Host: 169.254.169.254\rHost: evil.example\r\n", "H\x00ost: 169.254.169.254\r\nHost: evil.example\r\n", "Host;x: 169.254.169.254\r\nHost: evil.example\r\n",
	} {
		rs = append(rs, Request{Raw: "GET " + list + "/" + n.Own + v1 + lines + "\r\n"})
	}
	// A client of HTTP/1.1 without Host is answered as by the real endpoint, with its own.
	for _, h := range []string{"X-Forwarded-Host: evil.example", "X-Host: evil.example", "X-Forwarded-Server: evil.example", "X-HTTP-Host-Override: evil.example", "Forwarded: host=evil.example", ":authority: evil.example", "Origin: http://evil.example", "Referer: http://evil.example/"} {
		rs = append(rs, Request{Raw: "GET " + list + "/" + n.Own + v1 + host + h + "\r\n\r\n", Served: h[0] != ':'})
	}
	return rs
}

// authorities: a request target with an authority, as sent to a forward proxy, in every notation and scheme.
func authorities(n Names) (rs []Request) {
	target := list + "/" + n.Own
	for _, a := range append(notations(n), "169.254.169.254", "") {
		if strings.ContainsAny(a, "#?/\\") || len(a) > 1000 {
			continue
		}
		for _, t := range []string{"http://" + a + target, "http://" + a + list + "/" + n.Node} {
			rs = append(rs, Request{Raw: get(t), Served: slices.Contains(genuine, a) && t == "http://"+a+target})
		}
	}
	for _, scheme := range strings.Fields(`https ftp gopher file dict jar netdoc ldap ldaps tftp ws wss sftp php data view-source HTTP hTTp http+unix unix ssh telnet smb mailto`) {
		for _, t := range []string{target, "/latest/user-data"} {
			rs = append(rs, Request{Raw: get(scheme + "://169.254.169.254" + t)}, Request{Raw: get(scheme + ":" + t)})
		}
	}
	for _, t := range []string{
		"http:/169.254.169.254" + target, "http:169.254.169.254" + target, "http:///169.254.169.254" + target, "http:\\\\169.254.169.254" + target, "//169.254.169.254" + target, "///169.254.169.254" + target, "\\\\169.254.169.254" + target,
		"169.254.169.254" + target, "169.254.169.254:80" + target, "169.254.169.254:80", "http://169.254.169.254:80@evil.example" + target, "http://evil.example#@169.254.169.254" + target, "http://evil.example?@169.254.169.254" + target,
		"http://evil.example\\@169.254.169.254" + target, "http://169.254.169.254 " + target, "http://169.254.169.254\t" + target, "http://169.254.169.254%09" + target, "http://169.254.169.254\\" + target, "http://169.254.169.254/http://169.254.169.254" + target,
		"http://169.254.169.254:80http://169.254.169.254" + target, "http://http://169.254.169.254" + target, "http://169.254.169.254//latest/user-data", "http://169.254.169.254/./latest/user-data", "http://169.254.169.254/latest/user-data",
		"http://169.254.169.254/%2e%2e/latest/user-data", "http://169.254.169.254;/latest/user-data", "http://169.254.169.254?/latest/user-data#", "http://[169.254.169.254]" + target, "http://[fd00:ec2::254" + target, "http://fd00:ec2::254]" + target,
		"{http://169.254.169.254}" + target, "<http://169.254.169.254>" + target, "\"http://169.254.169.254\"" + target, "*", "**", "*" + target, ".", "..", "?", "#", "", " ", "latest/meta-data/", "latest" + target, "." + target, ".." + target, "~" + target, "@169.254.169.254" + target,
	} {
		rs = append(rs, Request{Raw: get(t), Served: strings.HasPrefix(t, "http://169.254.169.254?")})
	}
	return rs
}

// headers by which proxies and applications are told who asks, and for what. None of them counts.
func headers(n Names) (rs []Request) {
	who := strings.Fields(`X-Real-IP X-Real-Ip-Address X-Client-IP Client-IP True-Client-IP CF-Connecting-IP CF-Connecting-IPv6 Fastly-Client-IP Cluster-Client-IP X-Cluster-Client-IP X-Remote-IP X-Remote-Addr Remote-Addr REMOTE_ADDR
		X-Originating-IP X-Original-Remote-Addr X-Forwarded Forwarded-For Forwarded-For-Ip X-Forwarded-By X-Forwarded-For-Original X-Forward-For X-Forwared-For X-ProxyUser-Ip Proxy-Client-IP WL-Proxy-Client-IP HTTP_X_FORWARDED_FOR HTTP_CLIENT_IP
		X-Custom-IP-Authorization X-Azure-ClientIP X-Azure-SocketIP X-Appengine-User-Ip X-Envoy-External-Address X-Envoy-Original-Dst-Host X-Trusted-IP X-Source-IP Source-IP X-Host-IP X-BlueCoat-Via Via X-Coming-From Ali-CDN-Real-IP X-Gateway-IP
		X-Amzn-Source-Ip X-Ip X-ip-address IP ip_address X-From-IP X-Backend-Server X-Kubernetes-Pod-IP X-Pod-IP X-Pod-Name X-Role X-IAM-Role Metadata Metadata-Flavor X-Google-Metadata-Request X-IDENTITY-HEADER podname podns`)
	for _, h := range who {
		for _, v := range []string{n.OtherIP, "127.0.0.1", n.OtherIP + ", " + n.NodeIP} {
			rs = append(rs, Request{Raw: "GET " + list + "/" + v1 + host + h + ": " + v + "\r\n\r\n", Served: true},
				Request{Raw: "GET " + list + "/" + n.Other + v1 + host + h + ": " + v + "\r\n\r\n"})
		}
	}
	for _, h := range []string{"X-Forwarded-For", "x-forwarded-for", "X-FORWARDED-FOR"} {
		for _, v := range []string{n.OtherIP, "", " ", "unknown", "127.0.0.1, " + n.OtherIP} {
			rs = append(rs, Request{Raw: "PUT /latest/api/token" + v1 + host + ttl + "60\r\n" + h + ": " + v + "\r\n\r\n"}, Request{Raw: "GET " + list + "/" + n.Own + v1 + host + h + ": " + v + "\r\n\r\n"})
		}
	}
	rs = append(rs, Request{Raw: "GET " + list + "/" + n.Own + v1 + host + "Forwarded: for=" + n.OtherIP + ";by=" + n.NodeIP + ";host=x;proto=http\r\n\r\n", Served: true})
	for _, h := range strings.Fields(`X-Original-URL X-Rewrite-URL X-Original-URI X-Override-URL X-Forwarded-Uri X-Forwarded-Path X-Forwarded-Prefix X-Envoy-Original-Path X-Accel-Redirect X-Sendfile X-Proxy-URL Request-Uri Uri Url Redirect Base-Url Http-Url Destination
		Content-Location Location Referer Proxy-Host X-Waf-Bypass X-Http-Destinationurl X-HTTP-Path-Override`) {
		for _, v := range []string{"/latest/user-data", list + "/" + n.Node, "http://169.254.169.254/latest/user-data"} {
			rs = append(rs, Request{Raw: "GET /" + v1 + host + h + ": " + v + "\r\n\r\n", Served: true}, Request{Raw: "GET /latest/x" + v1 + host + h + ": " + v + "\r\n\r\n"})
		}
	}
	for _, h := range strings.Fields(`X-HTTP-Method-Override X-HTTP-Method X-Method-Override X-HTTP-Method_Override _method`) {
		for _, m := range []string{"PUT", "GET", "DELETE", "CONNECT"} {
			rs = append(rs, Request{Raw: "GET /latest/api/token" + v1 + host + h + ": " + m + "\r\n" + ttl + "60\r\n\r\n"}, Request{Raw: "POST " + list + "/" + n.Own + v1 + host + h + ": " + m + "\r\nContent-Length: 0\r\n\r\n"})
		}
	}
	for _, h := range []string{
		"Connection: X-aws-ec2-metadata-token", "Connection: close, Host", "Proxy-Connection: keep-alive", "Max-Forwards: 0", "Range: bytes=0-", "If-None-Match: *", "If-Modified-Since: Thu, 01 Jan 1970 00:00:00 GMT", "If-Match: x", "Expect: 100-continue",
		"TE: trailers", "Accept-Encoding: gzip, br, zstd", "Accept: application/json", "Content-Type: application/json", "Cookie: session=x", "Authorization: Basic YWRtaW46YWRtaW4=", "Authorization: AWS4-HMAC-SHA256 Credential=x", "Proxy-Authorization: Basic eDp4",
		"X-Amz-Security-Token: x", "X-aws-ec2-metadata-token-ttl-seconds: 60", "User-Agent: aws-sdk-go-v2/1.47.7", "User-Agent: imdsgate", "User-Agent: " + strings.Repeat("A", 8000), "Upgrade-Insecure-Requests: 1", "Sec-Fetch-Site: cross-site", "Early-Data: 1", "Cache-Control: no-cache",
	} {
		rs = append(rs, Request{Raw: "GET " + list + "/" + n.Own + v1 + host + h + "\r\n\r\n", Served: true}, Request{Raw: "GET /latest/user-data" + v1 + host + h + "\r\n\r\n"})
	}
	return rs
}

// lines are request lines and versions that are none.
func lines(n Names) (rs []Request) {
	t := list + "/" + n.Node
	for _, l := range []string{
		"GET " + t, "GET " + t + "\r\n", "GET /latest/user-data\n", "GET  " + t + v1, "GET\t" + t + v1, "GET " + t + "\tHTTP/1.1\r\n", "GET " + t + "  HTTP/1.1\r\n", " GET " + t + v1, "\tGET " + t + v1, "GET" + t + v1, "GET " + t + " HTTP/1.1 \r\n",
		"GET " + t + " HTTP/1.1 x\r\n", "GET " + t + " HTTP/1.2\r\n", "GET " + t + " HTTP/1.10\r\n", "GET " + t + " HTTP/1.01\r\n", "GET " + t + " HTTP/01.1\r\n", "GET " + t + " HTTP/2\r\n", "GET " + t + " HTTP/2.0\r\n", "GET " + t + " HTTP/3.0\r\n", "GET " + t + " HTTP/0.9\r\n",
		"GET " + t + " HTTP/9.9\r\n", "GET " + t + " http/1.1\r\n", "GET " + t + " HTTPS/1.1\r\n", "GET " + t + " HTTP/1,1\r\n", "GET " + t + " HTTP/1\r\n", "GET " + t + " HTTP/\r\n", "GET " + t + " HTTP /1.1\r\n", "GET " + t + " HTTP/1.1\rX\r\n", "GET " + t + " HTTP/1.1\x00\r\n",
		"GET " + t + " RTSP/1.0\r\n", "GET " + t + " ICAP/1.0\r\n", "GET " + t + " HTTP/1.1 HTTP/1.1\r\n", "GET / HTTP/1.1 " + t + v1, "GET / " + t + v1, "GET\x0b" + t + v1, "GET\x0c" + t + v1, "GET\xa0" + t + v1, "GET\x00" + t + v1, "GET " + t + "\x0bHTTP/1.1\r\n",
		"\x00GET " + t + v1, "\xef\xbb\xbfGET " + t + v1, "\r\r\nGET " + t + v1, "\n\nGET " + t + v1, "\r\n\r\n\r\nGET " + t + v1, "GET " + t + "\r\nHTTP/1.1\r\n", "GE\r\nT " + t + v1, "", "\r\n", "\x00\x00\x00\x00", "GET", "GET ", "GET  ", "HTTP/1.1 200 OK\r\n", "HTTP/1.1\r\n", ": x\r\n",
	} {
		rs = append(rs, Request{Raw: l + host + "\r\n"})
	}
	rs = append(rs,
		Request{Raw: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"},
		Request{Raw: "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + get(t)}, Request{Raw: "GET /" + v1 + host + "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", Served: true},
		Request{Raw: "GET " + t + v1 + host + "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: eDEyMzQ1Njc4OTAxMjM0NQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"},
		Request{Raw: "GET " + t + v1 + host + "Connection: Upgrade\r\nUpgrade: TLS/1.0\r\n\r\n"}, Request{Raw: "\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + strings.Repeat("\x00", 160)},
		Request{Raw: "\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10"}, Request{Raw: "SSH-2.0-x\r\n"}, Request{Raw: "PROXY TCP4 " + n.OtherIP + " 169.254.169.254 5 80\r\n" + get(list+"/"+n.Other)},
		Request{Raw: "\r\n\r\n\x00\r\nQUIT\n\x21\x11\x00\x0c" + strings.Repeat("\x0a", 12) + get(t)}, Request{Raw: "EHLO x\r\nMAIL FROM:<x>\r\n"}, Request{Raw: "*1\r\n$4\r\nINFO\r\n"}, Request{Raw: "GET / HTTP/1.1\n" + "Host: 169.254.169.254\n\n", Served: true},
		Request{Raw: "GET " + t + " HTTP/1.1\nHost: 169.254.169.254\n\n"}, Request{Raw: "GET " + t + " HTTP/1.1\rHost: 169.254.169.254\r\r"}, Request{Raw: "GET " + t + " HTTP/1.0\r\n\r\n"}, Request{Raw: "GET /latest/user-data HTTP/1.0\r\nConnection: keep-alive\r\n\r\n"},
	)
	return rs
}

// methods, by the letter. Only GET, HEAD and PUT mean anything.
func methods(n Names) (rs []Request) {
	for _, m := range strings.Fields(`POST DELETE PATCH OPTIONS TRACE CONNECT PROPFIND PROPPATCH MKCOL COPY MOVE LOCK UNLOCK SEARCH REPORT ACL BIND UNBIND REBIND LINK UNLINK PURGE BAN DEBUG TRACK SOURCE MERGE CHECKOUT VERSION-CONTROL MKACTIVITY BASELINE-CONTROL LABEL UPDATE
		QUERY PRI SUBSCRIBE NOTIFY get Get GeT put head Head GETS GET, XGET GE G 0 - GET/ GET; G%45T %47ET GET\x00 INVENTED ` + strings.Repeat("M", 300)) {
		for _, t := range []string{list + "/" + n.Own, list + "/", "/latest/api/token", "/latest/user-data", "/"} {
			rs = append(rs, Request{Raw: m + " " + t + v1 + host + ttl + "60\r\nContent-Length: 0\r\n\r\n"})
		}
	}
	for _, t := range []string{list + "/", list + "/" + n.Own, "/latest/user-data", "/latest/meta-data/placement/region", "/", "/latest/api", "/latest/api/token/", "//latest/api/token", "/latest/api/token?x/", "/1.0/api/token", "/x/api/token"} {
		rs = append(rs, Request{Raw: "PUT " + t + v1 + host + ttl + "60\r\nContent-Length: 0\r\n\r\n", Served: strings.HasPrefix(t, "/latest/api/token?")})
	}
	return rs
}

// tokens: how long one may live, and what passes for one.
func tokens(n Names) (rs []Request) {
	for _, v := range append(strings.Split("0|-1|-0|+60|60.0|60,60|6e1|0x3c|0b1|1_0|21601|99999|999999|65596|4294967356|18446744073709551676|9223372036854775807| |  |a|60s|60 s|\"60\"|'60'|;60|60;|60\x00|60\x0b|６０|٦٠|六十|NaN|Infinity|1e3|00021600|true|null|[60]|{}|%36%30|-21600|60-|1 2|\t", "|"), strings.Repeat("9", 500), strings.Repeat("0", 500)+"60") {
		rs = append(rs, Request{Raw: "PUT /latest/api/token" + v1 + host + ttl + v + "\r\nContent-Length: 0\r\n\r\n"})
	}
	put := "PUT /latest/api/token" + v1 + host
	for _, h := range []string{
		"", ttl + "60\r\n" + ttl + "60\r\n", ttl + "60\r\n" + ttl + "21600\r\n", "X-aws-ec2-metadata-token-ttl-second: 60\r\n", "X_aws_ec2_metadata_token_ttl_seconds: 60\r\n", "X-aws-ec2-metadata-token-ttl-seconds : 60\r\n", " " + ttl + "60\r\n", "X: y\r\n " + ttl + "60\r\n",
		"X-aws-ec2-metadata-token-ttl-seconds\x00: 60\r\n", "Metadata: true\r\n", "ttl: 60\r\n",
	} {
		rs = append(rs, Request{Raw: put + h + "\r\n"})
	}
	for _, q := range []string{"?ttl=60", "?X-aws-ec2-metadata-token-ttl-seconds=60", "?x"} {
		rs = append(rs, Request{Raw: "PUT /latest/api/token" + q + v1 + host + "\r\n"})
	}
	for _, v := range []string{
		"", " ", "x", "null", "undefined", "AQAEx", strings.Repeat("A", 56), strings.Repeat("A", 55), strings.Repeat("A", 57), strings.Repeat("A", 64), strings.Repeat("=", 56), strings.Repeat("A", 12000), "../../etc/passwd", "' or '1'='1", "%00", "\x01", strings.Repeat("\xff", 56),
		strings.Repeat("-", 56), strings.Repeat("_", 56), "Bearer x", "AQAE" + strings.Repeat("0", 52), "AQ" + strings.Repeat("A", 54), "{{7*7}}", "${jndi:ldap://x}", "*", "A B",
	} {
		for _, t := range []string{list + "/", list + "/" + n.Own, "/", "/latest/meta-data/placement/region", "/latest/user-data"} {
			rs = append(rs, Request{Raw: "GET " + t + v1 + host + session + v + "\r\n\r\n"})
		}
	}
	rs = append(rs, Request{Raw: "GET " + list + "/" + v1 + host + session + "x\r\n" + session + "y\r\n\r\n"}, Request{Raw: "GET " + list + "/?token=x" + v1 + host + "\r\n", Served: true})
	return rs
}

// injections of line ends, where an application puts what it was given into a request.
func injections(n Names) (rs []Request) {
	second := "GET /latest/user-data HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n"
	for _, nl := range []string{"%0d%0a", "%0a", "%0d", "%E5%98%8A%E5%98%8D", "%c4%8d%c4%8a", "\\r\\n", "%5cr%5cn", "%250d%250a", "%u000d%u000a", "\u010d\u010a", "\u2028", "\x85", "\x0b", "\x0c", "\x1c", "%23%0a", "%00%0d%0a"} {
		for _, t := range []string{
			"/latest/meta-data/placement/region" + nl + "X-aws-ec2-metadata-token: x", "/latest/meta-data/placement/region%20HTTP/1.1" + nl + "Host:%20169.254.169.254" + nl + nl + "GET%20/latest/user-data", list + "/" + n.Own + nl + n.Node,
			"/" + nl + "GET /latest/user-data", "/?" + nl + "X: y",
		} {
			rs = append(rs, Request{Raw: get(t), Served: strings.HasPrefix(t, "/?") && !strings.ContainsAny(nl, "\x0b\x0c\x1c")})
		}
		rs = append(rs, Request{Raw: "GET /latest/x" + v1 + host + "X: y" + nl + "X-Original-URL: /latest/user-data\r\n\r\n"}, Request{Raw: "GET /latest/x" + v1 + "Host: 169.254.169.254" + nl + "X: y\r\n\r\n"},
			Request{Raw: "GET " + list + "/" + v1 + host + session + "x" + nl + second + "\r\n"})
	}
	return rs
}

// smuggled is a request for what nobody may have, and one for another pod's role, hidden in what may be a body.
func smuggled(n Names) []string {
	return []string{get("/latest/user-data"), get(list + "/" + n.Other)}
}

// framing: bodies whose end two parsers see in different places.
func framing(n Names) (rs []Request) {
	head := "PUT /latest/api/token" + v1 + host + ttl + "60\r\n"
	for _, s := range smuggled(n) {
		for _, cl := range []string{
			"%d", "0%d", "+%d", "-%d", " %d ", "%d ", "\t%d", "%d\t", "0x%x", "%d,%[1]d", "%d, %[1]d", "0, %d", "%d;", "%d.0", "%de0", "\"%d\"", "'%d'", "%d %[1]d", "%d\x00", "%d\x0b", "0b%b", "1_%d", "%d%%20", "(%d)", "%dx", "x%d", "٢%d", "NaN", "18446744073709551616", "99999999999999999999",
			"9223372036854775807", "-1", "-0", "", " ",
		} {
			v := cl
			if strings.Contains(cl, "%") {
				v = fmt.Sprintf(cl, len(s))
			}
			rs = append(rs, Request{Raw: head + "Content-Length: " + v + "\r\n\r\n" + s, Served: true})
		}
		for _, h := range []string{
			"Content-Length: 0\r\nContent-Length: %d\r\n", "Content-Length: %d\r\nContent-Length: 0\r\n", "Content-Length: %d\r\nContent-Length: %[1]d\r\n", "Content-Length: 0\r\n Content-Length: %d\r\n", "Content-Length: 0\r\n %d\r\n", "Content-Length:\r\n %d\r\n", "Content-Length : %d\r\n",
			"Content-Length\t: %d\r\n", " Content-Length: %d\r\n", "\tContent-Length: %d\r\n", "Content_Length: %d\r\n", "Content Length: %d\r\n", "content-length: %d\r\n", "CONTENT-LENGTH: %d\r\n", "Content-Length\x00: %d\r\n", "\x00Content-Length: %d\r\n", "X: y\rContent-Length: %d\r\n",
			"X: y\nContent-Length: %d\r\n", "X: y\n\rContent-Length: %d\r\n", "Content-Length: %d\nX: y\r\n", "Content-Encoding: gzip\r\nContent-Length: %d\r\n", "Content-Length: %d\r\nTransfer-Encoding: chunked\r\n", "Transfer-Encoding: chunked\r\nContent-Length: %d\r\n",
			"Content-Length: 4\r\nTransfer-Encoding: identity\r\n", "Connection: Content-Length\r\nContent-Length: %d\r\n", "Content-Length: %d\r\nExpect: 100-continue\r\n", "Content-Length: %d\r\nExpect: x\r\n", "Content-Length: %d\r\nConnection: close\r\n", "Trailer: Content-Length\r\nContent-Length: %d\r\n",
			"Content-Length: %d\r\nHost: 169.254.169.254\r\n", "Content-Length;x: %d\r\n", "Content-Length:%d\r\n", "Content-Length:\t\t%d\r\n", "Content-Length=%d\r\n", ":\r\nContent-Length: %d\r\n", ": x\r\nContent-Length: %d\r\n", "X\r\nContent-Length: %d\r\n",
		} {
			v := h
			if strings.Contains(h, "%d") {
				v = fmt.Sprintf(h, len(s))
			}
			rs = append(rs, Request{Raw: head + v + "\r\n" + s, Served: true}, Request{Raw: "GET /" + v1 + host + v + "\r\n" + s, Served: true})
		}
		chunk := fmt.Sprintf("%x", len(s))
		for _, b := range []string{
			chunk + "\r\n" + s + "\r\n0\r\n\r\n", chunk + ";a=b\r\n" + s + "\r\n0\r\n\r\n", chunk + ";\n" + s + "\r\n0\r\n\r\n", chunk + ";\r" + s + "\r\n0\r\n\r\n", chunk + "\n" + s + "\n0\n\n", "0\r\n\r\n" + s, "0\r\n" + s, "00000000\r\n\r\n" + s, "0;x\r\n\r\n" + s, "0\r\nX: y\r\n\r\n" + s,
			"0\r\nContent-Length: 5\r\n\r\n" + s, "0\r\nHost: evil.example\r\n\r\n" + s, "0x" + chunk + "\r\n" + s + "\r\n0\r\n\r\n", "+" + chunk + "\r\n" + s + "\r\n0\r\n\r\n", "-1\r\n" + s, " " + chunk + "\r\n" + s + "\r\n0\r\n\r\n", chunk + " \r\n" + s + "\r\n0\r\n\r\n", "\t" + chunk + "\r\n" + s,
			"ffffffffffffffff\r\n" + s, "fffffffffffffffff\r\n" + s, "8000000000000000\r\n" + s, "1\r\n" + s, "5\r\nhello" + s, "5\r\nhelloXX0\r\n\r\n" + s, "5\r\nhello0\r\n\r\n" + s, "G\r\n" + s, "\r\n" + s, "\r\n0\r\n\r\n" + s, "\n" + s, "" + s, "0\n\n" + s, "0\r\r\n" + s, "0\r\n\r" + s, "0_0\r\n\r\n" + s,
			"0;" + strings.Repeat("a", 5000) + "\r\n\r\n" + s, "0\r\n" + strings.Repeat("X: y\r\n", 800) + "\r\n" + s,
		} {
			rs = append(rs, Request{Raw: head + "Transfer-Encoding: chunked\r\n\r\n" + b, Served: true})
		}
	}
	return rs
}

// encodings: spellings of Transfer-Encoding that one parser sees and another does not, with every byte around it that may be
// taken for a space.
func encodings(n Names) (rs []Request) {
	s := smuggled(n)[0]
	body := "0\r\n\r\n" + s
	try := func(lines string) {
		rs = append(rs, Request{Raw: "PUT /latest/api/token" + v1 + host + ttl + "60\r\n" + fmt.Sprintf("Content-Length: %d\r\n", len(body)) + lines + "\r\n\r\n" + body, Served: true})
	}
	for _, te := range []string{
		"Transfer-Encoding: xchunked", "Transfer-Encoding: chunkedx", "Transfer-Encoding: chunk", "Transfer-Encoding: identity", "Transfer-Encoding: chunked, identity", "Transfer-Encoding: identity, chunked", "Transfer-Encoding: cow, chunked", "Transfer-Encoding: chunked, cow",
		"Transfer-Encoding: cow chunked bar", "Transfer-Encoding: chunked, chunked", "Transfer-Encoding: chunked\r\nTransfer-Encoding: x", "Transfer-Encoding: x\r\nTransfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: \"chunked\"", "Transfer-Encoding: 'chunked'",
		"TRANSFER-ENCODING: CHUNKED", "tRANSFER-eNCODING: cHUNKED", "Transfer_Encoding: chunked", "Transfer Encoding: chunked", "Transfer\r-Encoding: chunked", "Transfer-Encoding", "Transfer-Encoding:", "Transfer-Encoding:\r\n chunked", "Transfer-Encoding:\n chunked", "Transfer-Encoding\r\n : chunked",
		"X: y\r\n Transfer-Encoding: chunked", "X: y\rTransfer-Encoding: chunked", "X: y\nTransfer-Encoding: chunked", "X: y\n\rTransfer-Encoding: chunked", "Transfer-Encoding: chunked\r\n\tx", "Transfer-Encoding: ,chunked", "Transfer-Encoding: chunked,", "Transfer-Encoding: chunked;q=1",
		"Transfer-Encoding: chunked ; x", "Transfer-Encoding: ch\x96nked", "Transf\x82r-Encoding: chunked", "Transfer-Encoding: chun\u212aed", "Content-Encoding: chunked", "TE: chunked", "Transfer-Coding: chunked", "X-Transfer-Encoding: chunked", "Transfer-Encoding: chunked\x00", "Transfer-Encoding:\x00chunked",
		"Connection: Transfer-Encoding\r\nTransfer-Encoding: chunked", "Transfer-Encoding:chunked", "Transfer-Encoding:  chunked", "Transfer-Encoding: chunked ", "Transfer-Encoding: \r\n chunked", "Transfer%2dEncoding: chunked", "Transfer-Encoding: %63hunked",
	} {
		try(te)
	}
	for c := range 256 {
		if c == '\r' || c == '\n' {
			continue
		}
		if c > ' ' && c < 0x7f && c%8 != 0 { // most of what can be printed is alike
			continue
		}
		b := string([]byte{byte(c)})
		try("Transfer-Encoding:" + b + "chunked")
		try("Transfer-Encoding" + b + ": chunked")
		try(b + "Transfer-Encoding: chunked")
		try("Transfer-Encoding: chunked" + b)
	}
	return rs
}

// pipelines: what one request leaves behind for the next on the same connection.
func pipelines(n Names) (rs []Request) {
	parts := []string{
		get("/"), get(list + "/"), get(list + "/" + n.Own), get("/latest/meta-data/placement/region"), get("/latest/nothing"), "HEAD " + list + "/" + v1 + host + "\r\n", "PUT /latest/api/token" + v1 + host + ttl + "60\r\n\r\n",
		"PUT /latest/api/token" + v1 + host + ttl + "60\r\nContent-Length: 5\r\n\r\nhello", "GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n", "POST /" + v1 + host + "Content-Length: 0\r\n\r\n", "GET /" + v1 + "Host: evil.example\r\n\r\n", "GET " + list + "/" + v1 + host + session + "x\r\n\r\n",
		"OPTIONS *" + v1 + host + "\r\n", "CONNECT 169.254.169.254:80" + v1 + host + "\r\n",
	}
	for _, first := range parts {
		for _, last := range append(smuggled(n), get("/latest/dynamic/instance-identity/pkcs7"), "PUT "+list+"/"+n.Node+v1+host+"\r\n") {
			rs = append(rs, Request{Raw: first + last, Served: true}, Request{Raw: first + "\r\n" + last, Served: true}, Request{Raw: strings.TrimSuffix(first, "\r\n") + last, Served: true})
		}
	}
	rs = append(rs, Request{Raw: strings.Repeat(get("/latest/user-data"), 60)}, Request{Raw: strings.Repeat(parts[6], 40) + get("/latest/user-data"), Served: true})
	return rs
}

// mutants of the other requests, the same in every run.
func mutants(n Names, of []Request) (rs []Request) {
	of = slices.DeleteFunc(of, func(r Request) bool { return len(r.Raw) > 600 })
	random := rand.New(rand.NewPCG(254, 169))
	pieces := []string{"\r\n", "\n", "\r", "\x00", " ", "\t", ":", "/", "..", "%2f", "%00", "//", "\r\n\r\n", "HTTP/1.1", "Host: ", "Content-Length: 5\r\n", "Transfer-Encoding: chunked\r\n", "latest", "user-data", n.Node, n.Other, "169.254.169.254", "0", "é", "\xff", "?", "#", "@"}
	for range 1000 {
		b := of[random.IntN(len(of))].Raw
		for range 1 + random.IntN(3) {
			i := random.IntN(len(b) + 1)
			j := min(len(b), i+random.IntN(12))
			switch random.IntN(5) {
			case 0:
				b = b[:i] + b[j:]
			case 1:
				b = b[:i] + pieces[random.IntN(len(pieces))] + b[i:]
			case 2:
				b = b[:i] + b[i:j] + b[i:]
			case 3:
				b = b[:i] + string([]byte{byte(random.IntN(256))}) + b[min(len(b), i+1):]
			default:
				other := of[random.IntN(len(of))].Raw
				b = b[:i] + other[random.IntN(len(other)):]
			}
		}
		rs = append(rs, Request{Raw: b, Served: true})
	}
	return rs
}
